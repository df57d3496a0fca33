"""Trials: fresh processes that run one config for real, are watched, measured, and leave nothing behind.

trainable.py      one trial under Ray Tune: holds the GPUs, asks each node's pool, puts the results together
pool.py           `NodePool`: one per node; keeps a warm fork server and runs gangs of ranks
gang.py           one trial on one node as its parent sees it: watch, decide, kill, reap
child.py          a rank's process before any heavy library: where it sits, whom it dies with, how it reports
preload.py        what the fork server imports
ray_train.py      the second launcher: one trial under Ray Tune and Ray Train's `TorchTrainer`
train_run.py      one trial under Ray Train as its driver sees it
train_watch.py    what the ranks say there, and what their silence means
train_worker.py   a rank as a worker of Ray Train
worker.py         a rank: process group, memory, engine, measurement
measure.py        the measuring protocol: which micro-steps are timed, and how
device_memory.py  peaks of device memory; on CPU the enforced limit
failure.py        what an exception in a rank means
leftovers.py      the driver that died, processes that left a rank's group
host_memory.py    whether the kernel killed a process of ours for memory
build_cache.py    compiled extensions, without the stale locks of killed builds
environment.py    versions and device names
compose.py        what the ranks measured -> `Measurement`
"""
