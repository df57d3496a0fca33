import json
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.spec.config import ENGINES, PRECISIONS, Offload, TrialConfig

scalars = st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
configs = st.builds(
    TrialConfig,
    engine=st.sampled_from(ENGINES),
    gpus=st.integers(1, 4096),
    micro_batch_size=st.integers(1, 1024),
    sequence_length=st.integers(1, 2**20),
    precision=st.sampled_from(PRECISIONS),
    zero_stage=st.integers(0, 3),
    offload=st.sampled_from(get_args(Offload)),
    activation_checkpointing=st.sampled_from(("none", "full", "selective")),
    selective_every=st.none() | st.integers(1, 64),
    attention=st.sampled_from(("sdpa", "eager", "flash_attention_2", "flex_attention")),
    deepspeed=st.dictionaries(st.text(), scalars, max_size=4).map(lambda keys: tuple(keys.items())),
)


def config(**changes: object) -> TrialConfig:
    fields = {"engine": "deepspeed", "gpus": 8, "micro_batch_size": 4, "sequence_length": 4096, **changes}
    return TrialConfig.from_dict(fields)


@given(configs)
def test_a_config_survives_json(drawn: TrialConfig) -> None:
    again = TrialConfig.from_dict(json.loads(json.dumps(drawn.to_dict())))
    assert again == drawn
    assert again.fingerprint == drawn.fingerprint
    assert hash(again) == hash(drawn)


@given(configs, configs)
def test_different_configs_have_different_fingerprints(first: TrialConfig, second: TrialConfig) -> None:
    if first != second:
        assert first.fingerprint != second.fingerprint


def test_the_order_of_deepspeed_keys_does_not_matter() -> None:
    pairs = (("zero_optimization.reduce_bucket_size", 50_000_000), ("zero_optimization.overlap_comm", True))
    first, second = (
        TrialConfig(engine="deepspeed", gpus=8, micro_batch_size=4, sequence_length=4096, deepspeed=keys)
        for keys in (pairs, pairs[::-1])
    )
    assert first == second
    assert first.fingerprint == second.fingerprint


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    program = (
        "from autotune.spec.config import TrialConfig;"
        "print(TrialConfig(engine='deepspeed', gpus=8, micro_batch_size=4, sequence_length=4096).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == config().fingerprint
    assert len(config().fingerprint) == 16
    assert int(config().fingerprint, 16) >= 0


@pytest.mark.parametrize("fields", [{"unknown": 1}, {"gpus": 1, "zero": 3}])
def test_unknown_and_missing_fields_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        config(**fields)
    with pytest.raises(TypeError):
        TrialConfig.from_dict({"engine": "deepspeed"})


def test_describe_names_what_differs_from_the_default() -> None:
    short = config(zero_stage=3).describe()
    assert short.startswith("deepspeed zero-3 bf16 mb 4")
    assert "ckpt" not in short
    changes = {"activation_checkpointing": "selective", "selective_every": 2, "offload": "optimizer"}
    long = config(**changes, attention="flash_attention_2").describe()
    layout = config(engine="pytorch", zero_stage=3, data_parallel_replicate_size=2, tensor_parallel_size=2)
    assert layout.describe().endswith("replicate 2 tp 2")
    assert (layout.data_parallel_size, layout.shards) == (4, 2)
    assert long.endswith("ckpt selective/2 offload optimizer flash_attention_2")
