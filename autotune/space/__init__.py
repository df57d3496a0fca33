"""From a search-space file to legal candidates.

file.py      the YAML as pydantic models; every error names the key, what was found, what is allowed
legality.py  the rules that refuse a config, each with its reason
space.py     Space: axes, candidates, and the translation between configs and axis values
"""
