"""`autotune doctor`: what will not work on this machine, and the remedy.

check.py      what a check finds, and how a check that breaks is reported
diagnosis.py  which checks there are
software.py   Python, packages, PyTorch against the driver, DeepSpeed's ops, compilers, forked ranks
gpus.py       NVIDIA GPUs and who uses them
machine.py    disks, shared memory, host memory, limits, stale build locks
services.py   Ray and the store
cluster.py    every node of a Ray cluster; node.py and all_reduce.py run there
probe.py      what needs heavy libraries, run in a process of its own so that ours stays without CUDA
"""
