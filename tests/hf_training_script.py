"""A training script of a user: transformers' Trainer on a YAML file of TrainingArguments.

    torchrun --nproc-per-node 2 hf_training_script.py training_args.yaml report.json

With DEVICE_MAP=auto it is started by plain python, and its model is loaded with that. It trains five steps of a tiny,
real Qwen3 and writes what it saw while it did. Of the files it knows nothing.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.hooks import AlignDevicesHook
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from autotune.engines.batches import sequence
from autotune.modeling import device_map
from autotune.modeling.build import checkpointed_layers, huggingface_config
from autotune.modeling.device_map import balanced_map
from autotune.spec.config import TrialConfig
from autotune.spec.model import load_model

SEQUENCE_LENGTH = 64


def adapt_deepspeed_to_cpu() -> None:
    """Between the Trainer and DeepSpeed, put what DeepSpeed needs on a CPU and what no exported file may contain.

    Without it DeepSpeed compiles C++ for minutes. The engine of the trials does the same to the same document.
    """
    import deepspeed
    import deepspeed.ops

    from autotune.engines.deepspeed import _adapt_to_cpu

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # in time for `zero.Init`
    initialize = deepspeed.initialize

    def adapted(*, config_params: dict[str, Any], **rest: Any) -> Any:
        _adapt_to_cpu(config_params)
        return initialize(config_params=config_params, **rest)

    deepspeed.initialize = adapted


def pretend_gpus() -> None:
    """accelerate shards by FSDP2 only where it believes to be on GPUs; torch's FSDP2 itself runs on CPU as well."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def spread(folder: Path) -> PreTrainedModel:
    """The model of a folder, loaded with `device_map="auto"`: on a CPU that is one device, of which transformers makes
    no map. So it is given the map of two GPUs with accelerate's hooks, all of which lead to the CPU.
    """
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map="auto"
    )
    adapters = {"method": "lora", "lora_rank": 1, "lora_alpha": 1, "lora_target_modules": "mlp", "device_map": "auto"}
    config = TrialConfig.from_dict(
        {"engine": "pytorch", "gpus": 2, "micro_batch_size": 1, "sequence_length": SEQUENCE_LENGTH, **adapters}
    )
    numbers = balanced_map(load_model("qwen3-tiny", Path()), config)
    cpu = torch.device("cpu")
    device_map.spread(model, dict.fromkeys(numbers, cpu), cpu)
    model.hf_device_map = numbers
    return model.train()


class Watch:
    """Counts what passes through the model: the rows of each forward pass, and the passes of each decoder layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows: list[int] = []
        self.tokens: set[int] = set()
        self.dtypes: set[str] = set()
        self.passes: Counter[int] = Counter()
        model.register_forward_pre_hook(lambda _m, _a, kw: self._saw(kw["input_ids"]), with_kwargs=True)
        for index, layer in enumerate(checkpointed_layers(model)):
            layer.self_attn.register_forward_pre_hook(lambda *_, index=index: self.passes.update([index]))
            layer.mlp.down_proj.register_forward_hook(lambda _m, _a, output: self.dtypes.add(str(output.dtype)))

    def _saw(self, input_ids: torch.Tensor) -> None:
        self.rows.append(len(input_ids))
        self.tokens.add(input_ids.shape[1])


def sharding(trainer: Trainer) -> dict[str, Any]:
    wrapped = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        return {
            "wrapper": "deepspeed",
            "zero_stage": wrapped.zero_optimization_stage(),
            "micro_batch_size": wrapped.train_micro_batch_size_per_gpu(),
            "gradient_accumulation_steps": wrapped.gradient_accumulation_steps(),
            "global_batch_size": wrapped.train_batch_size(),
            "bf16": wrapped.bfloat16_enabled(),
            "clipping": wrapped.gradient_clipping(),
            "reduce_bucket_size": wrapped.zero_reduce_bucket_size(),
            "optimizer": {key: (wrapped.optimizer_params() or {}).get(key) for key in ("lr", "weight_decay")},
        }
    if isinstance(wrapped, DistributedDataParallel):
        return {"wrapper": "ddp"}
    if not distributed.is_initialized():
        return {
            "wrapper": type(wrapped).__name__,
            "is_model_parallel": trainer.is_model_parallel,
            "n_gpu": trainer.args.n_gpu,
            "hooked_layers": sum(
                isinstance(layer._hf_hook, AlignDevicesHook) for layer in checkpointed_layers(wrapped)
            ),
            "weights": sorted({str(parameter.dtype) for parameter in wrapped.parameters()}),
        }
    layers = checkpointed_layers(wrapped)
    states = [layer._get_fsdp_state() for layer in layers if isinstance(layer, FSDPModule)]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    return {
        "wrapper": "fsdp2",
        "layers_wrapped": [len(groups), len(layers)],
        "reshard_after_forward": sorted({group.post_forward_mesh_info is not None for group in groups}),
        "policies": sorted({f"{group.mp_policy.param_dtype} {group.mp_policy.reduce_dtype}" for group in groups}),
        "weights": sorted({str(parameter.dtype) for parameter in wrapped.parameters()}),
        "shards": sorted({type(parameter).__name__ for parameter in wrapped.parameters()}),
    }


def optimizer(trainer: Trainer) -> str:
    """The kind of the one inside what accelerate and DeepSpeed put around it."""
    found: Any = trainer.optimizer
    while hasattr(found, "optimizer"):
        found = found.optimizer
    bits = f" {found.args.optim_bits} bits" if hasattr(found, "args") else ""
    bits += f", blocks of {found.block_size}" if hasattr(found, "block_size") else ""
    return f"{type(found).__module__}.{type(found).__name__}{bits}"


def main() -> None:
    (arguments,) = HfArgumentParser(TrainingArguments).parse_yaml_file(sys.argv[1])
    if arguments.deepspeed:
        adapt_deepspeed_to_cpu()
    if arguments.fsdp:
        pretend_gpus()
    spec = load_model("qwen3-tiny", Path())
    config = huggingface_config(spec)
    folder = Path(sys.argv[1]).parent
    adapted = (folder / "adapter_config.json").exists()
    dtype = torch.bfloat16 if adapted else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if os.environ.get("DEVICE_MAP") == "auto":  # as the folder's README says
        model.save_pretrained(folder / "model")
        model = spread(folder / "model")
    if adapted:  # as the folder's README says
        from peft import LoraConfig

        model.add_adapter(LoraConfig.from_pretrained(str(folder)))
        if not arguments.deepspeed:
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                parameter.data = parameter.data.float()
    vocabulary = model.config.vocab_size
    rows = [torch.from_numpy(sequence(1, 0, index, SEQUENCE_LENGTH, vocabulary)) for index in range(256)]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    if "PARALLELISM_CONFIG_SP_SIZE" in os.environ:  # as the folder's README says
        examples = [{**example, "position_ids": torch.arange(SEQUENCE_LENGTH)} for example in examples]
    watch = Watch(model)
    trainer = Trainer(model, arguments, train_dataset=examples)
    result = trainer.train()
    gathered: list[Any] = [watch.rows]
    if distributed.is_initialized():
        gathered = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, watch.rows)
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        report = {
            "steps": trainer.state.global_step,
            "loss": result.training_loss,
            "rows": gathered,
            "tokens_of_a_row": sorted(watch.tokens),
            "passes": [watch.passes[index] for index in sorted(watch.passes)],
            "dtypes": sorted(watch.dtypes),
            "sharding": sharding(trainer),
            "optimizer": optimizer(trainer),
            "trained": sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad),
        }
        Path(sys.argv[2]).write_text(json.dumps(report))
    if distributed.is_initialized():
        distributed.barrier()
    # DeepSpeed's own gloo groups may abort the process while the interpreter ends ("terminate called without an active
    # exception"), now and then. What is tested is over by now.
    os._exit(0)


if __name__ == "__main__":
    main()
