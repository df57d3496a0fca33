"""From a search-space file to legal candidates.

file.py        the YAML as pydantic models; every error names the key, what was found, what is allowed
legality.py    the rules that refuse a config, each with its reason and the fields that it reads
grid.py        Grid: every combination of the axes and its verdict, judged by numpy
candidates.py  Candidates and Columns: the legal configs, made one by one when asked for, or as one array an axis
space.py       Space: axes, candidates, and the translation between configs and axis values
"""
