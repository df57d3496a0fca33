"""The command line. It builds the parts and hands them to the study.

main.py      the entry point: errors become one sentence and an exit code
options.py   options that several verbs share
tune.py      run or resume a study
predict.py   the memory of the cases in a file, without a GPU
read.py      studies, show, best: read the store
export.py    the winner as files for other tools
jobs.py      submit, status, logs, stop, fetch: a study as a job of a Ray cluster
doctor.py    what will not work here, and the remedy

Data goes to stdout, talk to stderr. Heavy libraries are imported by the verbs that need them, so that `--help` is
instant.
"""
