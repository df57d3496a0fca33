"""Configs that every format is tried on."""

from typing import Any

from hypothesis import strategies as st

from autotune.spec.config import TrialConfig
from autotune.spec.workload import Workload

WORKLOAD = Workload(global_batch_size=1024, learning_rate=2e-5, weight_decay=0.1, max_gradient_norm=0.5)


def config(**fields: Any) -> TrialConfig:
    return TrialConfig(**{"engine": "deepspeed", "gpus": 8, "micro_batch_size": 2, "sequence_length": 4096, **fields})


@st.composite
def any_config(draw: st.DrawFn) -> TrialConfig:
    """A config that a trial on GPUs can run."""
    engine = draw(st.sampled_from(["deepspeed", "pytorch"]))
    stage = draw(st.sampled_from([0, 1, 2, 3] if engine == "deepspeed" else [0, 2, 3]))
    offloads = ["none", "optimizer", "optimizer+parameters"]
    precision = draw(st.sampled_from(["bf16", "fp16", "fp32"]))
    if engine == "pytorch":
        offload = draw(st.sampled_from(["none", "optimizer+parameters"])) if stage and precision != "fp16" else "none"
    else:
        offload = draw(st.sampled_from(offloads[: stage if stage < 3 else 3] or ["none"]))
    checkpointing = draw(st.sampled_from(["none", "full", "selective"]))
    return config(
        engine=engine,
        zero_stage=stage,
        gpus=draw(st.sampled_from([1, 8, 16])),
        micro_batch_size=draw(st.sampled_from([1, 4])),
        precision=precision,
        offload=offload,
        activation_checkpointing=checkpointing,
        selective_every=draw(st.sampled_from([2, 3])) if checkpointing == "selective" else None,
        deepspeed=(("zero_optimization.reduce_bucket_size", 100_000),) if engine == "deepspeed" and stage else (),
    )
