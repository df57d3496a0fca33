"""The model of a trial: what is built, how it is laid out, and how its bytes are counted.

build.py           the Hugging Face model on meta, its checkpointing, its FSDP2 sharding, its random weights
memory_tracker.py  live and peak bytes of tensors, with a limit, on any device and on fake tensors
"""
