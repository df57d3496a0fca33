"""What a config will need, without a device.

Memory is traced: the engine's own step runs on fake tensors, which have shapes and no data.
"""
