"""How far are predictions from what other people measured and published?

    python benchmarks/foreign.py --data DIR [--json]

DIR is any folder with files named and shaped as below; missing ones are skipped with a note. Each row becomes a case by
one function a file, with an explicit `implementation`, and goes through `autotune.predict.cases.answer` as `autotune
predict` would send it. Nothing is fitted to the rows.

- `qwen_inference_speed_memory.csv`: Qwen's tables, rows of Hugging Face transformers with a memory value. They print
  `torch.cuda.max_memory_allocated` summed over the GPUs in units of 2^30 or 2^20 bytes (the speed benchmarks in
  QwenLM/Qwen and QwenLM/Qwen3). Gate: bf16 rows, median error at most 6 %.
- `nanotron_bench_final2.csv`: the Ultra-Scale Playbook's sweep. Gate: of the rows that ran out of memory at least 98 %
  are foretold, with at most 3 % false alarms among those that ran; rows that failed otherwise are left out. Runs that
  logged one result before some rank ran out of memory are in neither class: both ways to count them are shown. Reserved
  bytes are of the first stage, where rank 0 is.
- `qwen1_finetune_profile.csv`, `ms_swift_benchmark.csv`: reported. Full fine-tuning on one GPU goes to the traced
  prediction, by engine pytorch; LoRA, adapters and models without a known architecture are skipped and counted.

Times of the same sweep and of two more tables are judged by `foreign_time.py`, whose docstring says how.

On the same rows stand two other estimates: DeepSpeed's `estimate_zero2/3_model_states_mem_needs` (without offload) and
what `accelerate estimate-memory` prints: the weights' bytes for inference, its largest column for training with Adam.
"""

import argparse
import contextlib
import csv
import io
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from accelerate.commands.estimate import estimate_training_usage
from foreign_time import mpt_time, nanotron_time, vtrain_time

from autotune.predict.cases import answer
from autotune.predict.shape import read_shape
from autotune.units import GIB, MIB

Row = dict[str, str]
Case = dict[str, Any]

INFERENCE_GATE = 0.06
RECALL_GATE, FALSE_ALARM_GATE = 0.98, 0.03

_A100, _H100, _H20 = "A100-80GB", "H100-80GB", "H20-96GB"
_GPUS = {"A100-SXM4-80GB": _A100, "A100-80GB": _A100, "H100-80GB": _H100, "H20-96GB": _H20}


def _qwen(family: str, hidden: int, layers: int, heads: int, key_heads: int, inner: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "intermediate_size": inner,
        "vocab_size": 151936,
        "max_position_embeddings": 40960 if family.startswith("qwen3") else 32768,
        **more,
    }


_TIED = {"tie_word_embeddings": True}
_PADDED = {"vocab_size": 152064}
# config.json of the models on the Hugging Face Hub, read as facts. Qwen1 has the shapes of Qwen1.5.
MODELS: dict[str, dict[str, Any]] = {
    "Qwen1.5-0.5B": _qwen("qwen2", 1024, 24, 16, 16, 2816, **_TIED),
    "Qwen1.5-1.8B": _qwen("qwen2", 2048, 24, 16, 16, 5504),
    "Qwen1.5-4B": _qwen("qwen2", 2560, 40, 20, 20, 6912),
    "Qwen1.5-7B": _qwen("qwen2", 4096, 32, 32, 32, 11008),
    "Qwen1.5-14B": _qwen("qwen2", 5120, 40, 40, 40, 13696, **_PADDED),
    "Qwen1.5-32B": _qwen("qwen2", 5120, 64, 40, 8, 27392, **_PADDED),
    "Qwen1.5-72B": _qwen("qwen2", 8192, 80, 64, 64, 24576, **_PADDED),
    "Qwen1.5-110B": _qwen("qwen2", 8192, 80, 64, 8, 49152, **_PADDED),
    "Qwen1.5-MoE-A2.7B": _qwen(
        "qwen2_moe", 2048, 24, 16, 16, 5632, max_position_embeddings=8192, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4,
    ),
    "Qwen2-0.5B": _qwen("qwen2", 896, 24, 14, 2, 4864, **_TIED),
    "Qwen2-1.5B": _qwen("qwen2", 1536, 28, 12, 2, 8960, **_TIED),
    "Qwen2-7B": _qwen("qwen2", 3584, 28, 28, 4, 18944, **_PADDED),
    "Qwen2-72B": _qwen("qwen2", 8192, 80, 64, 8, 29568, **_PADDED),
    "Qwen2-57B-A14B": _qwen(
        "qwen2_moe", 3584, 28, 28, 4, 18944, moe_intermediate_size=2560,
        shared_expert_intermediate_size=20480, num_experts=64, num_experts_per_tok=8,
    ),
    "Qwen2.5-3B": _qwen("qwen2", 2048, 36, 16, 2, 11008, **_TIED),
    "Qwen2.5-14B": _qwen("qwen2", 5120, 48, 40, 8, 13824, **_PADDED),
    "Qwen2.5-32B": _qwen("qwen2", 5120, 64, 40, 8, 27648, **_PADDED),
    "Qwen3-0.6B": _qwen("qwen3", 1024, 28, 16, 8, 3072, head_dim=128, **_TIED),
    "Qwen3-1.7B": _qwen("qwen3", 2048, 28, 16, 8, 6144, head_dim=128, **_TIED),
    "Qwen3-4B": _qwen("qwen3", 2560, 36, 32, 8, 9728, head_dim=128, **_TIED),
    "Qwen3-8B": _qwen("qwen3", 4096, 36, 32, 8, 12288, head_dim=128),
    "Qwen3-14B": _qwen("qwen3", 5120, 40, 40, 8, 17408, head_dim=128),
    "Qwen3-32B": _qwen("qwen3", 5120, 64, 64, 8, 25600, head_dim=128),
    "Qwen3-30B-A3B": _qwen(
        "qwen3_moe", 2048, 48, 32, 4, 6144, head_dim=128, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8,
    ),
    "Qwen3-235B-A22B": _qwen(
        "qwen3_moe", 4096, 94, 64, 4, 12288, head_dim=128, moe_intermediate_size=1536, num_experts=128,
        num_experts_per_tok=8,
    ),
}  # fmt: skip
_SAME_SHAPE = {f"Qwen2.5-{size}": f"Qwen2-{size}" for size in ("0.5B", "1.5B", "7B", "72B")}
_SAME_SHAPE |= {f"Qwen-{size}": f"Qwen1.5-{size}" for size in ("1.8B", "7B", "14B", "72B")}
_SWIFT_MODELS = {"qwen-1_8b-chat": "Qwen-1.8B", "qwen-7b-chat": "Qwen-7B", "qwen-14b-chat": "Qwen-14B"}

_LIBRARIES = {
    "Qwen_v1_README": "qwen1-remote-code",
    "Qwen1.5_docs": "transformers-4.37",
    "Qwen2_docs": "transformers-4.37",
    "Qwen2.5_docs": "transformers-4.46",
    "Qwen3_docs": "transformers",
}
_QUANTIZATIONS = {"bf16": "none", "awq-int4": "awq"}


def architecture(name: str) -> dict[str, Any] | None:
    """The config of a model as tables name it, with what they append for chat and quantisation."""
    base = re.sub(r"-(Chat|Instruct|GPTQ|AWQ|FP8|Int[48]).*", "", name)
    return MODELS.get(_SAME_SHAPE.get(base, base))


def inference_case(row: Row) -> Case | None:
    """A row of `qwen_inference_speed_memory.csv`, or None where memory or the setting is not given."""
    model = architecture(row["model"])
    if row["extras"] != "transformers" or not row["peak_mem"] or model is None or row["source"] not in _LIBRARIES:
        return None
    return {
        "id": row["model"],
        "model": model,
        "cluster": {"gpu": _GPUS[row["gpu"]], "gpus_per_node": _count(row["n_gpus"])},
        "task": "generate",
        "implementation": _LIBRARIES[row["source"]],
        "config": {
            "batch_size": _count(row["micro_batch"]),
            "prompt_tokens": _count(row["input_len"] or "1"),  # Qwen1 encodes one token
            "new_tokens": _count(row["output_len"]),
            "precision": "bf16" if row["precision"] == "bf16" else "fp16",
            "quantization": _QUANTIZATIONS.get(row["precision"], row["precision"]),
        },
    }


def nanotron_case(row: Row) -> Case:
    """A row of `nanotron_bench_final2.csv`."""
    gpus = _count(row["n_gpus"])
    inner, hidden, heads = _count(row["ffn"]), _count(row["hidden"]), _count(row["heads"])
    return {
        "id": row["run_name"],
        "model": {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": _count(row["layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": _count(row["kv_heads"] or row["heads"]),
            "intermediate_size": inner,
            "vocab_size": _count(row["vocab"]),
            "max_position_embeddings": _count(row["seq_len"]),
            "tie_word_embeddings": inner < 10_000,  # scripts/scaling_benchmarks.py
        },
        "cluster": {"gpu": _GPUS[row["gpu"]], "nodes": max(1, gpus // 8), "gpus_per_node": min(8, gpus)},
        "implementation": "nanotron",
        "workload": {"sequence_length": _count(row["seq_len"])},
        "config": {
            "tensor_parallel_size": _count(row["tp"]),
            "pipeline_parallel_size": _count(row["pp"]),
            "data_parallel_size": _count(row["dp"]),
            "zero_stage": _count(row["sharding"].removeprefix("zero")),
            "micro_batch_size": _count(row["micro_batch"]),
            "gradient_accumulation_steps": _count(row["grad_accum"]),
        },
    }


def tuning_case(row: Row) -> Case | None:
    """A row of the two fine-tuning tables, or None where no prediction exists for its method or model."""
    model = architecture(_SWIFT_MODELS.get(row["model"], row["model"]))
    if row["method"] != "full" or row["precision"] != "bf16" or row["outcome"] != "ok" or model is None:
        return None
    if not row["peak_mem"] or not row["seq_len"] or _count(row["n_gpus"]) > 1:
        return None
    batch = _count(row["micro_batch"])
    return {
        "id": row["model"],
        "model": model,
        "cluster": {"gpu": _GPUS[row["gpu"]]},
        "implementation": "transformers",
        "workload": {
            "sequence_length": _count(row["seq_len"]),
            "global_batch_size": batch * _count(row["grad_accum"] or "1"),
        },
        "config": {
            "engine": "pytorch",
            "micro_batch_size": batch,
            "activation_checkpointing": row.get("act_ckpt") or "full",  # finetune.py of QwenLM/Qwen switches it on
        },
    }


def _count(text: str) -> int:
    return int(float(text))


def _bytes(row: Row) -> float:
    return float(row["peak_mem"]) * (MIB if row["peak_mem_unit"].startswith("M") else GIB)


class Errors:
    """Relative errors of one estimate, predicted / measured - 1."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def add(self, predicted: float, measured: float) -> None:
        """One row."""
        self._values.append(predicted / measured - 1)

    def summary(self) -> dict[str, Any]:
        """n, median and 90th percentile of the absolute error, and bias: the median error."""
        if not self._values:
            return {"n": 0}
        sizes = sorted(abs(value) for value in self._values)
        return {
            "n": len(sizes),
            "median_error": round(statistics.median(sizes), 4),
            "p90_error": round(sizes[int(0.9 * (len(sizes) - 1))], 4),
            "bias": round(statistics.median(self._values), 4),
        }


class Verdicts:
    """Did it run out of memory, and was that foretold?"""

    def __init__(self) -> None:
        self._counts: Counter[tuple[bool, bool]] = Counter()

    def add(self, *, ran_out: bool, foretold: bool) -> None:
        """One row."""
        self._counts[ran_out, foretold] += 1

    def summary(self) -> dict[str, Any]:
        """Confusion table, recall and rate of false alarms."""
        hit, missed = self._counts[True, True], self._counts[True, False]
        alarm, quiet = self._counts[False, True], self._counts[False, False]
        return {
            "oom_foretold": hit,
            "oom_missed": missed,
            "ran_foretold_oom": alarm,
            "ran_foretold_fit": quiet,
            "recall": round(hit / (hit + missed), 4) if hit + missed else None,
            "false_alarms": round(alarm / (alarm + quiet), 4) if alarm + quiet else None,
        }


def deepspeed_bytes(parameters: int, largest_layer: int, nodes: int, gpus_per_node: int, stage: int) -> float:
    """What DeepSpeed's own estimate says a GPU needs for the model's states."""
    with contextlib.redirect_stdout(io.StringIO()):
        if stage == 2:
            from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

            return float(estimate_zero2_model_states_mem_needs(parameters, gpus_per_node, nodes, cpu_offload=False)[1])
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

        return float(
            estimate_zero3_model_states_mem_needs(
                parameters, largest_layer, gpus_per_node, nodes, cpu_offload=False, cpu_offload_params=False
            )[1]
        )


def accelerate_training_bytes(parameters: int) -> float:
    """The largest column of `accelerate estimate-memory` for bf16 training with Adam."""
    return float(max(estimate_training_usage(4 * parameters, "bfloat16").values()))


def inference(rows: Iterable[Row]) -> dict[str, Any]:
    """Rows of transformers, by precision."""
    ours: dict[str, Errors] = defaultdict(Errors)
    weights: dict[str, Errors] = defaultdict(Errors)
    skipped: Counter[str] = Counter()
    for row in rows:
        case = inference_case(row)
        if case is None:
            skipped["another framework, no memory, or a model or setting that is not stated"] += 1
            continue
        found = answer(case)
        if "error" in found:
            skipped[found["error"]] += 1
            continue
        measured = _bytes(row)
        groups = [row["precision"], f"{row['precision']} {row['source']}"]
        size = {"none": 2, "gptq-int8": 1, "fp8": 1}.get(case["config"]["quantization"], 0.5)
        parameters = read_shape("row", case["model"]).num_parameters
        for group in groups:
            ours[group].add(found["peak_memory_allocated_bytes_of_all_gpus"], measured)
            weights[group].add(size * parameters, measured)
    gate = ours["bf16"].summary()
    return {
        "errors": {group: errors.summary() for group, errors in sorted(ours.items())},
        "accelerate_estimate_memory": {group: errors.summary() for group, errors in sorted(weights.items())},
        "skipped": dict(skipped),
        "gate": {"median_error_at_most": INFERENCE_GATE, "passed": gate.get("median_error", 1) <= INFERENCE_GATE},
    }


def nanotron(rows: Iterable[Row]) -> dict[str, Any]:
    """Out-of-memory verdicts by model, and reserved bytes of rank 0."""
    verdicts: dict[str, Verdicts] = defaultdict(Verdicts)
    late_as_oom, late_as_ran, deepspeed = Verdicts(), Verdicts(), Verdicts()
    reserved: dict[str, Errors] = defaultdict(Errors)
    skipped: Counter[str] = Counter()
    for row in rows:
        outcome = row["outcome"]
        if outcome not in ("ok", "oom", "ok_then_oom"):
            skipped[outcome] += 1
            continue
        case = nanotron_case(row)
        found = answer(case)
        if "error" in found:
            skipped[f"{outcome}: {found['error']}"] += 1
            continue
        foretold = not found["fits"]
        late_as_oom.add(ran_out=outcome != "ok", foretold=foretold)
        late_as_ran.add(ran_out=outcome == "oom", foretold=foretold)
        shape = read_shape("row", case["model"])
        cluster, parameters = case["cluster"], shape.num_parameters
        size = (cluster["nodes"], cluster["gpus_per_node"])
        estimates = {
            f"deepspeed zero{stage}": deepspeed_bytes(parameters, shape.embedding.parameters, *size, stage)
            for stage in (2, 3)
        }
        if outcome == "ok_then_oom":
            continue
        for group in ("all", row["model"]):
            verdicts[group].add(ran_out=outcome == "oom", foretold=foretold)
        deepspeed.add(ran_out=outcome == "oom", foretold=estimates["deepspeed zero2"] > 0.94 * 79.1 * GIB)
        if outcome == "ok" and row["peak_mem"]:
            measured = _bytes(row)
            reserved["ours"].add(found["rank_0_peak_memory_reserved_bytes"], measured)
            if measured > 15 * GIB:
                reserved["ours, more than 15 GiB"].add(found["rank_0_peak_memory_reserved_bytes"], measured)
            for name, estimate in estimates.items():
                reserved[name].add(estimate, measured)
            reserved["accelerate"].add(accelerate_training_bytes(parameters), measured)
    total = verdicts["all"].summary()
    recall, alarms = total["recall"], total["false_alarms"]
    return {
        "verdicts": {model: counts.summary() for model, counts in sorted(verdicts.items())},
        "with_ok_then_oom_as_oom": late_as_oom.summary(),
        "with_ok_then_oom_as_ran": late_as_ran.summary(),
        "verdicts_of_deepspeed_zero2": deepspeed.summary(),
        "reserved_rank_0": {name: errors.summary() for name, errors in reserved.items()},
        "skipped": dict(skipped),
        "gate": {
            "recall_at_least": RECALL_GATE,
            "false_alarms_at_most": FALSE_ALARM_GATE,
            "passed": recall is not None and recall >= RECALL_GATE and (alarms or 0.0) <= FALSE_ALARM_GATE,
        },
    }


def tuning(rows: Iterable[Row]) -> dict[str, Any]:
    """Full fine-tuning: reserved bytes, since neither table says how it measured."""
    errors: dict[str, Errors] = defaultdict(Errors)
    skipped: Counter[str] = Counter()
    for row in rows:
        case = tuning_case(row)
        if case is None:
            skipped[f"{row['method'] or 'no method'} on {row['n_gpus']} GPUs, {row['model']}"] += 1
            continue
        parameters = read_shape("row", case["model"]).num_parameters
        errors["deepspeed zero2"].add(deepspeed_bytes(parameters, 0, 1, 1, 2), _bytes(row))
        errors["accelerate"].add(accelerate_training_bytes(parameters), _bytes(row))
        found = answer(case)
        if "error" in found:
            skipped[found["error"]] += 1
            continue
        errors["ours"].add(found["peak_memory_reserved_bytes"], _bytes(row))
    return {"errors": {name: values.summary() for name, values in errors.items()}, "skipped": dict(skipped)}


def _nanotron_time(rows: Iterable[Row]) -> dict[str, Any]:
    found: dict[str, Any] = nanotron_time(rows, lambda row: nanotron_case(row)["model"])
    return found


Judge = Callable[[Iterable[Row]], dict[str, Any]]
FILES: dict[str, dict[str, Judge]] = {
    "qwen_inference_speed_memory.csv": {"memory": inference},
    "nanotron_bench_final2.csv": {"memory": nanotron, "time": _nanotron_time},
    "qwen1_finetune_profile.csv": {"memory": tuning},
    "ms_swift_benchmark.csv": {"memory": tuning},
    "vtrain_a100_iteration_times.csv": {"time": vtrain_time},
    "llm_foundry_mpt_throughput.csv": {"time": mpt_time},
}


def compare(folder: Path, kinds: Iterable[str]) -> dict[str, Any]:
    """Every file of the folder that we know; times have a `time: ` before its name."""
    report: dict[str, Any] = {}
    for name, judges in FILES.items():
        for kind, judge in judges.items():
            title = name if kind == "memory" else f"{kind}: {name}"
            path = folder / name
            if kind not in kinds:
                continue
            if not path.is_file():
                report[title] = {"note": "not in the folder"}
                continue
            with path.open(newline="", encoding="utf-8") as file:
                report[title] = judge(csv.DictReader(file))
    gates = {name: part["gate"]["passed"] for name, part in report.items() if "gate" in part}
    return {"files": report, "gates": gates}


def show(report: dict[str, Any]) -> None:
    """Plain lines."""
    for name, part in report["files"].items():
        print(f"\n{name}{'' if 'note' not in part else ': ' + part['note']}")
        for title, values in part.items():
            if title in ("note", "skipped", "gate"):
                continue
            print(f"  {title}")
            for group, row in values.items() if all(isinstance(v, dict) for v in values.values()) else [("", values)]:
                print(f"    {group:<28} " + "  ".join(f"{key} {value}" for key, value in row.items()))
        for reason, count in sorted(part.get("skipped", {}).items(), key=lambda item: -item[1]):
            print(f"  skipped {count}: {reason}")
        if "gate" in part:
            print(f"  gate {'passed' if part['gate']['passed'] else 'FAILED'}: {part['gate']}")


def main() -> int:
    """Print the comparison; 1 where a gate fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with the published tables")
    parser.add_argument("--only", choices=("memory", "time"), help="leave the other half out")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    report = compare(arguments.data, [arguments.only] if arguments.only else ("memory", "time"))
    show(report)
    if arguments.json:
        print(json.dumps(report))
    return 0 if all(report["gates"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
