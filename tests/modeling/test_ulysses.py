"""What attention between the all-to-alls is told; that it trains alike is shown by tests/engines/test_layouts.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from autotune.modeling import ulysses


@pytest.mark.parametrize("fails", [False, True])
def test_the_kernel_finds_its_own_name_in_the_config(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """transformers' flash attention imports what the config names."""
    told = []

    def attend(module: Any, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        told.append(module.config._attn_implementation)
        if fails:
            raise RuntimeError("out of memory")
        return query.transpose(1, 2), None

    AttentionInterface.register("recorded", attend)
    monkeypatch.setattr(ulysses, "_all_to_all", lambda parts, _group: parts)
    config = SimpleNamespace(_attn_implementation="autotune_ulysses")
    module = SimpleNamespace(config=config, sequence_group=SimpleNamespace(size=lambda: 1), inner_attention="recorded")
    heads = torch.randn(2, 4, 8, 16)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            ulysses._ulysses(module, heads, heads, heads, None)
    else:
        output, _ = ulysses._ulysses(module, heads, heads, heads, None)
        torch.testing.assert_close(output, heads.transpose(1, 2))
    assert told == ["recorded"]
    assert config._attn_implementation == "autotune_ulysses"  # with which later layers, and passes, find their way
