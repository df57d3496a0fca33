"""FlexAttention with its backward pass on a CPU, by the dense arithmetic that torch has of it beside the GPU kernels.

Everything around the kernels is as on a GPU: transformers' block masks and torch.compile's graphs, for which torch
refuses tensors of CPUs that require gradients.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import flex_attention
from transformers import masking_utils
from transformers.integrations import flex_attention as integration

DENSE = "flex_attention called without torch.compile"
"""How torch's warning begins where it computes every score, which is an error here."""


def _create_block_mask(*args: object, _compile: bool, **more: object) -> flex_attention.BlockMask:
    return flex_attention.create_block_mask(*args, **more)  # type: ignore[arg-type]  # handed on as they are


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """Meanwhile models with `attention: flex_attention` train on CPUs."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("error", message=DENSE)
        patch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
        patch.setattr(flex_attention, "_WARNINGS_SHOWN", set())  # torch warns once a process
        compiled = torch.compile(flex_attention.flex_attention, backend="aot_eager")
        patch.setattr(integration.WrappedFlexAttention, "__call__", lambda self: compiled)
        patch.setattr(masking_utils, "create_block_mask", _create_block_mask)  # not compiled, which takes seconds
        yield
    torch._dynamo.reset()
