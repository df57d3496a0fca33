"""Engines: one training step of a config, on the real library.

engine.py     the seam: `Engine`, and `build_engine`, which picks the implementation
batches.py    the synthetic global batch, the same for every split over ranks and micro-batches
deepspeed.py  DeepSpeed ZeRO 0-3 with offload
pytorch.py    DDP and FSDP2
layout.py     tensor and sequence parallel ranks besides, and a loss in chunks
pipeline.py   the layers in stages
"""
