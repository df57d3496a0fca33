"""From a search-space file to legal candidates.

file.py        the YAML as pydantic models; every error names the key, what was found, what is allowed
rule.py        Rule: a reason why a config may be illegal, and the fields that it reads
legality.py    the rules that refuse a config
layouts.py     those of tensor, sequence and pipeline parallelism
grid.py        Grid: every combination of the axes and its verdict, judged by numpy
candidates.py  Candidates and Columns: the legal configs, made one by one when asked for, or as one array an axis
space.py       Space: axes, candidates, and the translation between configs and axis values
"""
