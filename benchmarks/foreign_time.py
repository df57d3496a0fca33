"""The time half of `foreign.py`: predicted steps against what other people measured. Nothing is fitted to the rows.

- `nanotron_bench_final2.csv`: rows that ran, without pipelines from before their fix. Spearman's rank correlation of
  predicted and measured throughput in each scenario (model, key heads, vocabulary, GPUs) with at least ten rows, and
  its mean. Rows that were measured after the fix are taken to have run under `TORCH_DISTRIBUTED_DEBUG=DETAIL`, as the
  launch script that the authors published in March 2025 has it; with all rows predicted so, and with none, is shown
  beside.
  Ablation: the mean when one part is taken out of every predicted step.
- `vtrain_a100_iteration_times.csv`, `llm_foundry_mpt_throughput.csv`: errors of step times as they are, and as
  expected by the posterior that `tune` uses (`autotune.search.expected_improvement`) after five rows of the same
  machines, drawn at random and not scored; the median over twenty draws. For both, how many rows are within the 80 %
  interval.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.predict.layout_times import STEP_PROFILES, Layouts, predict_layouts
from autotune.predict.layouts import TRAINER_PROFILES, Layout, impossible
from autotune.predict.roofline import MEGATRON_KERNELS, TimePart
from autotune.predict.shape import DecoderShape, LayerShape, Matrix, read_shape
from autotune.predict.step import StepTimes
from autotune.predict.throughput import predict_trials
from autotune.predict.trials import Trials
from autotune.search.candidates import Candidates, Observed
from autotune.search.expected_improvement import Expectation, ExpectedImprovement
from autotune.search.step_parts import step_columns
from autotune.spec.cluster import ClusterSpec, find_gpu
from autotune.spec.config import TrialConfig
from autotune.spec.workload import Workload

Row = dict[str, str]
Values = NDArray[np.float64]
Predict = Callable[[Sequence[Row]], StepTimes]

RANK_GATE = 0.85
CALIBRATED_GATE = 0.08
SMALLEST_SCENARIO = 10
CALIBRATION_ROWS = 5
DRAWS = 20

_GPUS = {"A100": "A100-80GB"}
_NODE = 8
_FP16_MEGATRON = replace(
    STEP_PROFILES["megatron"],
    # Of Megatron-LM before --use-flash-attn: product written, softmax read and written, dropout with its mask, read.
    kernels=replace(MEGATRON_KERNELS, score_bytes=13),
    gradient_bytes=2,  # fp32 gradients are its default for bf16 alone
)
_MEGATRON_VOCABULARY = 51_200  # GPT-2's, padded to a multiple of 128
# llm-foundry of 2023: `attn_impl: triton`, 1.3 to 2.5 times slower than FlashAttention-2 (arXiv:2307.08691, section 4).
_MPT_KERNELS = replace(MEGATRON_KERNELS, attention_speed=0.55)
_MPT_VOCABULARY = 50_368
_MPT_SIZES = {
    "mpt-125m": (768, 12, 12),
    "mpt-350m": (1024, 24, 16),
    "mpt-760m": (1536, 24, 12),
    "mpt-1b": (2048, 24, 16),
    "mpt-3b": (2560, 32, 20),
    "mpt-7b": (4096, 32, 32),
    "mpt-13b": (5120, 40, 40),
    "mpt-30b": (7168, 48, 64),
    "mpt-70b": (8192, 80, 64),
}
"""Hidden size, layers and heads in scripts/train/yamls/pretrain."""


@cache
def gpt_shape(hidden: int, layers: int, heads: int, vocabulary: int) -> DecoderShape:
    """A decoder without gate in its MLP, four times as wide inside."""
    linear = (Matrix(hidden, hidden, 4), Matrix(4 * hidden, hidden), Matrix(hidden, 4 * hidden))
    layer = LayerShape(linear, (Matrix(hidden, 1, 4),), 4 * hidden)
    return DecoderShape(
        name="gpt",
        hidden_size=hidden,
        num_attention_heads=heads,
        query_width=hidden,
        key_value_width=hidden,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        layers=(layer,) * layers,
    )


def layout_of(row: Row) -> Layout:
    """The layout of a row of nanotron or vTrain."""
    return Layout(
        tensor_parallel_size=_count(row["tp"]),
        pipeline_parallel_size=_count(row["pp"]),
        data_parallel_size=_count(row["dp"]),
        zero_stage=1 if row.get("sharding") == "zero1" else 0,
        micro_batch_size=_count(row["micro_batch"]),
        gradient_accumulation_steps=_count(row["grad_accum"]),
        sequence_length=_count(row["seq_len"]),
        gpus_per_node=min(_NODE, _count(row["n_gpus"])),
        activation_checkpointing="full" if row.get("act_ckpt") == "full" else "none",
    )


def cluster_of(row: Row) -> ClusterSpec:
    """Nodes of eight."""
    gpus = _count(row["n_gpus"])
    gpu = find_gpu(_GPUS.get(row["gpu"], row["gpu"]))
    return ClusterSpec(nodes=max(1, gpus // _NODE), gpus_per_node=min(_NODE, gpus), gpu=gpu)


def _count(text: str) -> int:
    return int(float(text))


def spearman(left: Values, right: Values) -> float:
    """Rank correlation, equal values sharing their mean rank."""

    def ranks(values: Values) -> Values:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])

    return float(np.corrcoef(ranks(left), ranks(right))[0, 1])


def nanotron_time(rows: Iterable[Row], model_of: Callable[[Row], dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations by scenario, and what each part contributes to their mean.

    Args:
        rows: of the sweep.
        model_of: the Hugging Face config of a row.
    """
    scenarios: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["outcome"] == "ok" and (row["after_pp_fix"] == "True" or _count(row["pp"]) == 1):
            scenarios[row["model"], row["kv_heads"], row["vocab"], row["n_gpus"]].append(row)
    table: dict[str, dict[str, float]] = {}
    means: dict[str, list[float]] = defaultdict(list)
    skipped = 0
    for scenario, found in sorted(scenarios.items(), key=lambda item: (item[0][:3], _count(item[0][3]))):
        shape = read_shape("row", model_of(found[0]))
        profile = TRAINER_PROFILES["nanotron"]
        kept = [row for row in found if impossible(shape, layout_of(row), profile) is None]
        skipped += len(found) - len(kept)
        if len(kept) < SMALLEST_SCENARIO:
            continue
        layouts, cluster = Layouts.of([layout_of(row) for row in kept]), cluster_of(kept[0])

        plain, checked = (
            predict_layouts(shape, layouts, STEP_PROFILES[name], cluster, by_cost=profile.balances_by_cost)
            for name in ("nanotron", "nanotron-checked")
        )
        late = np.array([row["after_pp_fix"] == "True" for row in kept])
        parts = {part: np.where(late, checked.parts[part], plain.parts[part]) for part in TimePart}
        ours = replace(plain, parts=parts)
        measured = np.array([float(row["tokens_per_s_per_gpu"]) for row in kept])
        errors = np.abs(ours.tokens_per_second_per_gpu / measured - 1)
        table[" ".join(scenario)] = {
            "n": len(kept),
            "spearman": round(spearman(ours.tokens_per_second_per_gpu, measured), 4),
            "median_error": round(float(np.median(errors)), 4),
        }
        means["as launched"].append(spearman(ours.tokens_per_second_per_gpu, measured))
        means["all checked"].append(spearman(checked.tokens_per_second_per_gpu, measured))
        means["none checked"].append(spearman(plain.tokens_per_second_per_gpu, measured))
        for part in TimePart:
            without = ours.tokens_per_gpu / (ours.step_seconds - parts[part])
            means[f"without {part.value}"].append(spearman(without, measured))
    average = {name: round(float(np.mean(values)), 4) for name, values in means.items()}
    mean = average.get("as launched")
    return {
        "rank_correlation": table,
        "mean_rank_correlation": {name: value for name, value in average.items() if not name.startswith("without")},
        "contribution_to_mean": {
            name.removeprefix("without "): round((mean or 0.0) - value, 4)
            for name, value in average.items()
            if name.startswith("without")
        },
        "skipped": {"impossible here": skipped} if skipped else {},
        "gate": {"mean_at_least": RANK_GATE, "passed": mean is not None and mean >= RANK_GATE},
    }


def vtrain_time(rows: Iterable[Row]) -> dict[str, Any]:
    """Megatron-LM on A100: one node, and 8 to 64 of them."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["outcome"] == "ok" and row["step_time_s"]:
            groups[row["source"]].append(row)
    judged = {
        name: (
            found,
            _in_groups(found, ("hidden", "layers", "heads", "n_gpus", "gpu"), _vtrain_times),
            np.array([float(row["step_time_s"]) for row in found]),
        )
        for name, found in groups.items()
    }
    return _judge(judged, ("hidden", "layers", "n_gpus", "tp", "pp", "dp", "micro_batch", "grad_accum"), Counter())


def mpt_time(rows: Iterable[Row]) -> dict[str, Any]:
    """MPT under FSDP, by GPU."""
    groups: dict[str, list[Row]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    for row in rows:
        if row["precision"].endswith("fp8"):
            skipped["fp8"] += 1
        elif row["model"] not in _MPT_SIZES or not row["tokens_per_s_per_gpu"]:
            skipped[f"{row['model']}: no shape or no throughput"] += 1
        else:
            groups[row["gpu"]].append(row)
    judged = {
        gpu: (
            found,
            _in_groups(found, ("model", "n_gpus", "gpu"), _mpt_times),
            np.array([_mpt_tokens(row) / float(row["tokens_per_s_per_gpu"]) for row in found]),
        )
        for gpu, found in groups.items()
    }
    return _judge(judged, ("n_gpus", "micro_batch", "grad_accum", "seq_len"), skipped)


def _mpt_tokens(row: Row) -> int:
    return _count(row["micro_batch"]) * _count(row["grad_accum"] or "1") * _count(row["seq_len"])


def _vtrain_times(rows: Sequence[Row]) -> StepTimes:
    first, profile = rows[0], _FP16_MEGATRON
    shape = gpt_shape(_count(first["hidden"]), _count(first["layers"]), _count(first["heads"]), _MEGATRON_VOCABULARY)
    layouts = Layouts.of([layout_of(row) for row in rows])
    return predict_layouts(shape, layouts, profile, cluster_of(first), by_cost=False)


def _mpt_times(rows: Sequence[Row]) -> StepTimes:
    shape = gpt_shape(*_MPT_SIZES[rows[0]["model"]], _MPT_VOCABULARY)
    one_by_one = [_mpt_trials(row, shape) for row in rows]
    names = [field.name for field in fields(Trials)]
    columns = {name: np.concatenate([getattr(one, name) for one in one_by_one]) for name in names}
    return predict_trials(shape, Trials(**columns), cluster_of(rows[0]), _MPT_KERNELS)


def _mpt_trials(row: Row, shape: DecoderShape) -> Trials:
    config = TrialConfig(
        engine="pytorch",
        gpus=_count(row["n_gpus"]),
        zero_stage=3 if "full" in row["sharding"] else 2,
        precision="bf16",
        micro_batch_size=_count(row["micro_batch"]),
        sequence_length=_count(row["seq_len"]),
        activation_checkpointing="full" if row["act_ckpt"] == "full" else "none",
        attention="sdpa",
    )
    sequences = config.micro_batch_size * config.gpus * _count(row["grad_accum"] or "1")
    return Trials.of([config], Workload(global_batch_size=sequences), shape)


def _in_groups(rows: Sequence[Row], keys: tuple[str, ...], times: Predict) -> StepTimes:
    """Step times of all rows, those of one model and cluster predicted together."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[tuple(row[key] for key in keys)].append(index)
    found = [times([rows[index] for index in indexes]) for indexes in groups.values()]
    back = np.argsort(np.concatenate(list(groups.values())), kind="stable")
    joined = StepTimes(
        {part: np.concatenate([one.parts[part] for one in found]) for part in found[0].parts},
        np.concatenate([one.tokens_per_gpu for one in found]),
        np.concatenate([one.flops_per_token for one in found]),
        np.concatenate([one.peak_flops for one in found]),
        np.concatenate([one.issue_seconds for one in found if one.issue_seconds is not None]),
    )
    return joined.of(back)


def _posterior(rows: Sequence[Row], times: StepTimes, sizes: tuple[str, ...]) -> ExpectedImprovement:
    """What a study would know of the rows: predicted times, and how alike rows are. Memory plays no part."""
    same = np.ones(len(rows))
    shares, unknowns, issued = step_columns(times)
    return ExpectedImprovement(
        Candidates(
            features=np.log2([[float(row[size] or 1) for size in sizes] for row in rows]),
            throughput=times.tokens_per_second_per_gpu,
            shares=shares,
            unknowns=unknowns,
            issued=issued,
            peak_bytes=same,
            peak_deviation=0.01 * same,
            capacity_bytes=2.0,
            cost=same,
        )
    )


def _judge(
    groups: dict[str, tuple[list[Row], StepTimes, Values]], sizes: tuple[str, ...], skipped: Counter[str]
) -> dict[str, Any]:
    """Errors as they are and calibrated, by group and of all rows.

    Args:
        groups: rows with their predicted and measured step seconds.
        sizes: columns by which rows are more or less alike.
        skipped: rows that are not there.
    """
    chance = np.random.default_rng(0)
    table: dict[str, dict[str, float]] = {}
    nominal: list[Values] = []
    drawn: list[list[Values]] = [[] for _ in range(DRAWS)]
    for name, (rows, times, measured) in sorted(groups.items()):
        errors = times.step_seconds / measured - 1
        nominal.append(errors)
        search = _posterior(rows, times, sizes)
        table[name] = {"n": len(rows), **_summary(errors)}
        table[name]["coverage_of_80%"] = _coverage(search.expect([]), times, measured, np.arange(len(rows)))
        if len(rows) <= 2 * CALIBRATION_ROWS:
            continue
        medians, covered = [], []
        for draw in drawn:
            known = chance.choice(len(rows), CALIBRATION_ROWS, replace=False)
            others = np.setdiff1d(np.arange(len(rows)), known)
            speeds = times.tokens_per_gpu / measured
            expected = search.expect([Observed(candidate=int(at), throughput=float(speeds[at])) for at in known])
            rest = (speeds / expected.throughput)[others] - 1
            draw.append(rest)
            medians.append(float(np.median(np.abs(rest))))
            covered.append(_coverage(expected, times, measured, others))
        table[name]["calibrated_median_error"] = round(float(np.median(medians)), 4)
        table[name]["calibrated_worst_draw"] = round(max(medians), 4)
        table[name]["calibrated_coverage_of_80%"] = round(float(np.median(covered)), 4)
    pooled = [float(np.median(np.abs(np.concatenate(draw)))) for draw in drawn if draw]
    calibrated = round(float(np.median(pooled)), 4) if pooled else None
    if nominal:
        every = np.concatenate(nominal)
        table["all"] = {"n": len(every), **_summary(every)}
        if calibrated is not None:
            table["all"]["calibrated_median_error"] = calibrated
    return {
        "step_time_errors": table,
        "skipped": dict(skipped),
        "gate": {
            "calibrated_median_error_at_most": CALIBRATED_GATE,
            "passed": calibrated is not None and calibrated <= CALIBRATED_GATE,
        },
    }


def _coverage(expected: Expectation, times: StepTimes, measured: Values, scored: NDArray[np.int64]) -> float:
    """Share of rows whose throughput is within the 80 % interval."""
    low, high = expected.throughput_between(0.8)
    speeds = times.tokens_per_gpu / measured
    return round(float(((low <= speeds) & (speeds <= high))[scored].mean()), 4)


def _summary(errors: Values) -> dict[str, float]:
    sizes = np.abs(errors)
    return {
        "median_error": round(float(np.median(sizes)), 4),
        "p90_error": round(float(np.quantile(sizes, 0.9)), 4),
        "bias": round(float(np.median(errors)), 4),
    }
