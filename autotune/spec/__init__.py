"""The words that every part speaks: frozen values in pure Python, no heavy library.

model.py     ModelSpec: the architecture, read from a Hugging Face config
cluster.py   GpuSpec, ClusterSpec: the hardware, with sources
workload.py  Workload, MeasureSettings: what a step must do and how it is measured
config.py    TrialConfig: one point of the search space
outcome.py   Measurement | Failure: what a trial found out
record.py    TrialRecord, StudyRecord: what a store keeps
request.py   TrialRequest: all that a worker needs to run one trial
"""
