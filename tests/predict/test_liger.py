"""What stands for Liger's kernels in a trace: a step needs less memory than without.

That each allocates and saves what Liger's own does is in `tests/engines/test_liger.py`.
"""

import pytest

from autotune.predict import liger
from autotune.predict.trace import trace_stream
from tests.engines.parity import SMALL_BUCKETS
from tests.predict.test_layout_memory import a_request, predicted


@pytest.mark.parametrize(("engine", "stage"), [("pytorch", 3), ("pytorch", 0), ("deepspeed", 2), ("deepspeed", 3)])
def test_a_step_needs_less_than_without(engine: str, stage: int) -> None:
    keys = {"deepspeed": dict(SMALL_BUCKETS)} if engine == "deepspeed" else {}
    fields = {"engine": engine, "zero_stage": stage, "precision": "bf16", **keys}
    without, with_liger = (
        predicted(a_request(2, 2, 2, {**fields, **more}), 2, 0) for more in ({}, {"use_liger_kernel": True})
    )
    assert with_liger < 0.85 * without


def test_transformers_is_itself_again_after_a_trace() -> None:
    before = liger.rotary_module("qwen3").apply_rotary_pos_emb
    request = a_request(2, 1, 1, {"use_liger_kernel": True})
    trace_stream(request.model, request.config, accumulates=False)
    assert liger.rotary_module("qwen3").apply_rotary_pos_emb is before
