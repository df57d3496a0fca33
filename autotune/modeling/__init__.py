"""The model of a trial: what is built, how it is laid out, and how its bytes are counted.

build.py           the Hugging Face model on meta, its checkpointing, its FSDP2 sharding, its random weights
lora.py            adapters beside frozen weights
quantized.py       frozen weights in 4 bits
mesh.py            which ranks share what
stage.py           the decoder, or a pipeline stage of it, from token ids to the loss
tensor_parallel.py which rank has what of each matrix
ulysses.py         sequences in pieces, and heads in attention
checkpoint.py      weights of a model that is spread over ranks, from and to safetensors
memory_tracker.py  live and peak bytes of tensors, with a limit, on any device and on fake tensors
messages.py        what is on its way between ranks, and holds no memory once it has arrived
"""
