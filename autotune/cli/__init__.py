"""The command line. It builds the parts and hands them to the study.

main.py      the entry point: errors become one sentence and an exit code
options.py   options that several verbs share
tune.py      run or resume a study
read.py      studies, show, best: read the store

Data goes to stdout, talk to stderr. Heavy libraries are imported by the verbs that need them, so that `--help` is
instant.
"""
