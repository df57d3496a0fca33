"""The targets: who must be able to run the winner, what each of them cannot express, and what it leaves to the script.

The search asks before a trial and the export asks after it, so that what is exported was measured and what is measured
can be exported.

A target is a way of running, not only a file. The attention kernel and the dtype of the weights are chosen where the
script loads its model, under every target; so is activation checkpointing, except under the Trainer, which has
arguments for it.
"""

from typing import Literal, get_args

from autotune.formats.accelerate_yaml import parallelism_environment
from autotune.formats.bitsandbytes_json import TORCH_DTYPES, to_quantization_config
from autotune.formats.peft_json import to_adapter_config
from autotune.formats.training_args import checkpointing_argument
from autotune.spec.cluster import Device
from autotune.spec.config import KEPT_OPERATORS, MLP_TILES, Optimizer, TrialConfig
from autotune.spec.workload import Workload

Target = Literal["hf_trainer", "accelerate", "deepspeed", "autotune"]
"""`hf_trainer`: transformers' Trainer with training_args.yaml. `accelerate`: a script on accelerate's `Accelerator`
with accelerate.yaml. `deepspeed`: a script that calls `deepspeed.initialize` with ds_config.json. `autotune`: the
exported train.py, which trains on the user's text with the engine that trials ran."""

_NAMES = {"hf_trainer": "transformers' Trainer", "accelerate": "accelerate"}

_OPTIMIZERS: dict[Optimizer, str] = {
    "adamw": "`torch.optim.AdamW(…, fused=True)`",
    "adamw_8bit": "`bitsandbytes.optim.AdamW(…, optim_bits=8)`",
    "adamw_torch_8bit": "`torchao.optim.AdamW8bit(…)`",
}

TARGETS: tuple[Target, ...] = get_args(Target)

READ_BY_TARGETS = (
    "engine",
    "loss",
    "batching",
    "method",
    "activation_checkpointing",
    "data_parallel_replicate_size",
    "torch_compile",
    "fp8",
    "tiled_mlp",
)
"""Fields of a config that `cannot_express` reads, besides the degrees of parallelism."""


def cannot_express(target: Target, config: TrialConfig, device: Device) -> str | None:
    """Why `target` cannot run `config` as it was measured, or None when it can."""
    if target == "autotune" and config.method == "qlora":
        return "train.py loads no weights in 4 bits"
    if target == "autotune":
        if config.batching != "fixed":
            return f"train.py cuts text into sequences of one length, which is not batching {config.batching}"
        return None if config.engine == "pytorch" else "train.py runs engine pytorch alone"
    if target == "deepspeed":
        return None if config.engine == "deepspeed" else f"DeepSpeed does not run engine {config.engine}"
    # Sequences alone DeepSpeed shares as accelerate and the Trainer have it do.
    if config.has_own_layout and (config.engine == "pytorch" or config.sequence_parallel_size == 1):
        return f"{_NAMES[target]} does not run {config.own_layout} as trials do"
    if config.fp8:
        return f"{_NAMES[target]} has not been tried with fp8"
    if target == "hf_trainer":
        if config.activation_checkpointing == "selective_ops":
            return "TrainingArguments in YAML have no word for activation_checkpointing selective_ops"
        if config.data_parallel_replicate_size > 1:
            return "TrainingArguments in YAML have no word for data_parallel_replicate_size"
        if config.torch_compile:
            return "TrainingArguments compile the model in one piece, which is not what torch_compile means here"
        if config.tiled_mlp:  # nor have those of Liger's kernels, whose tiled MLPs are modules for models of one's own
            return "TrainingArguments have no word for tiled_mlp"
    if device == "cpu":
        return _not_on_cpu(target, config)
    return None


def no_target(targets: tuple[Target, ...], config: TrialConfig) -> str | None:
    """Why none of `targets` can run `config`, or None when one can.

    On GPUs, whatever the study runs on: a study on CPUs rehearses one on GPUs.
    """
    reasons = [cannot_express(target, config, "cuda") for target in targets]
    found = [reason for reason in reasons if reason is not None]
    return f"no target can run it: {'; '.join(found)}" if len(found) == len(reasons) else None


def _not_on_cpu(target: Target, config: TrialConfig) -> str | None:
    """What accelerate, which the Trainer stands on, does not do without a GPU (accelerate 1.15, read and tried)."""
    if config.precision == "fp16":
        return "accelerate refuses fp16 on CPU"
    if config.engine == "pytorch" and config.zero_stage:
        return "accelerate shards by FSDP2 on GPUs alone, on CPU it silently runs DDP"
    if config.engine == "pytorch" and target == "accelerate" and config.ranks > 1:
        return "`accelerate launch` silently starts one process on CPU, unless it is given mpirun's hostfile"
    return None


def _adapters(config: TrialConfig) -> list[str]:
    """How the script makes what LoRA trains, as the trial did."""
    fields = to_adapter_config(config)
    given = ", ".join(f"{key}={fields[key]!r}" for key in fields if key != "peft_type")
    # update_fsdp_plugin_peft (transformers 5.23) gives it a wrapping policy that fsdp2_prepare_auto_wrap_policy
    # (accelerate 1.15) does not know, and then no layer is a unit.
    why = "; of a `get_peft_model` the Trainer gathers all layers at once" if config.zero_stage >= 2 else ""
    todo = [f"then calls `model.add_adapter(peft.LoraConfig({given}))`{why if config.engine == 'pytorch' else ''}"]
    if config.engine == "pytorch" and config.precision != "fp32":
        cast = "for p in filter(lambda p: p.requires_grad, model.parameters()): p.data = p.data.float()"
        todo.append(f"then keeps what trains in fp32: `{cast}`")
    return todo


def left_to_script(target: Target, config: TrialConfig, workload: Workload) -> list[str]:
    """What the script itself must do under `target` to run `config` as it was measured, as Markdown."""
    if target == "autotune":
        return ["is `train.py` itself, a start to edit: how to run it stands at its top"]
    load = f'loads the model with `attn_implementation="{config.attention}"`'
    if config.method != "full":
        load += f" and `dtype=torch.{TORCH_DTYPES[config.precision]}`"
    elif config.engine == "pytorch":  # DeepSpeed casts weights and keeps fp32 masters, whatever it is given
        load += " and `dtype=torch.float32`"
    if config.method == "qlora":
        given = ", ".join(f"{key}={value!r}" for key, value in to_quantization_config(config).items())
        load += f", `quantization_config=BitsAndBytesConfig({given})`"
    if config.device_map == "auto":
        load += ' and `device_map="auto"`'
    elif config.method == "qlora":
        load += " and `device_map={'': local_rank}`"
    if config.use_liger_kernel and target != "hf_trainer":
        load += ", by `liger_kernel.transformers.AutoLigerKernelForCausalLM`"
    todo = [_sequences(config), load]
    if config.device_map == "auto":
        todo.append(
            f"is one process, without torchrun, that sees {config.gpus} GPUs and no others:"
            f" `CUDA_VISIBLE_DEVICES={','.join(map(str, range(config.gpus)))}`"
        )
    if config.sequence_parallel_size > 1:
        todo.append(_shared_sequences(target, config))
    if config.method != "full":
        todo += _adapters(config)
    if target == "hf_trainer":
        return todo
    made = _OPTIMIZERS[config.optimizer]
    if config.activation_checkpointing != "none":
        every = f", every_n_layers={config.selective_every}" if config.selective_every else ""
        context = ""
        if config.activation_checkpointing == "selective_ops":
            kept = ", ".join(f"torch.ops.{name}" for name in KEPT_OPERATORS)
            context = f', "context_fn": functools.partial(create_selective_checkpoint_contexts, [{kept}])'
        todo.append(f'calls `model.{checkpointing_argument()}_enable({{"use_reentrant": False{context}}}{every})`')
    if config.tiled_mlp:
        todo.append(_tiled_mlp(config))
    if target == "deepspeed" and config.tensor_parallel_size > 1:
        todo.append(
            f"gives {config.tensor_parallel_size} neighbours in rank the same sequences, which is for"
            f" `DistributedSampler(…, num_replicas={config.data_parallel_size},"
            f" rank=dist.get_rank() // {config.tensor_parallel_size})`"
        )
    if target == "accelerate":
        accumulation = workload.gradient_accumulation_steps(config)
        todo.append(
            f"makes batches of {config.micro_batch_size} and `Accelerator(gradient_accumulation_steps={accumulation})`"
        )
        if config.engine == "deepspeed":
            stands = "`accelerate.utils.DummyOptim`, which stands for the optimizer of the JSON"
            todo.append(f"optimizes with {stands if config.optimizer == 'adamw' else made}")
        else:
            todo.append(f"optimizes with {made} and `accelerator.clip_grad_norm_(…, {workload.max_gradient_norm:g})`")
    elif config.optimizer != "adamw":
        todo.append(f"hands {made} to `deepspeed.initialize` as its `optimizer`")
    return todo


def _shared_sequences(target: Target, config: TrialConfig) -> str:
    """What a script does so that neighbours in rank share sequences by DeepSpeed's Ulysses."""
    positions = f"has `position_ids` from 0 to {config.sequence_length - 1} beside the `labels` of each batch"
    if target == "hf_trainer":
        variables = " ".join(f"{name}={value}" for name, value in parallelism_environment(config).items())
        return f"{positions}, and the environment that `launch.sh` gives it: `{variables}`"
    loss = "computes its loss as the Trainer does, by transformers' `deepspeed_sp_compute_loss`"
    if target == "accelerate":
        return f"{positions}, prepares model and loader in one call, and {loss}"
    return (
        f"{positions}, hands what `UlyssesSPAttentionHF.register_with_transformers(model,"
        f' core_attn_implementation="{config.attention}", sequence_parallel_size={config.sequence_parallel_size},'
        f" micro_batch_size={config.micro_batch_size})` returns to `deepspeed.initialize` as its `mpu`, puts"
        f" `UlyssesSPDataLoaderAdapter` around its loader, and {loss}"
    )


def _tiled_mlp(config: TrialConfig) -> str:
    """How the script has each MLP work on a piece of the sequence at a time, as the trial did."""
    if config.engine == "deepspeed":
        where = " by `TiledMLP` of `deepspeed.runtime.sequence_parallel.ulysses_sp`"
        call = (
            f"TiledMLP.apply(lambda _, piece: forward(piece), mlp, x, {MLP_TILES},"
            " [p for p in mlp.parameters() if p.requires_grad])"
        )
    else:
        where = ""
        call = (
            "torch.cat([torch.utils.checkpoint.checkpoint(forward, piece, use_reentrant=False)"
            f" for piece in x.chunk({MLP_TILES}, dim=1)], dim=1)"
        )
    return (
        f"has each MLP compute {MLP_TILES} pieces of a sequence one after another{where}: `for mlp in (layer.mlp for"
        f" layer in model.model.layers): mlp.forward = functools.partial(lambda mlp, forward, x: {call}, mlp,"
        " mlp.forward)`"
    )


def _sequences(config: TrialConfig) -> str:
    """What a script's collator does under each batching, by the names of transformers' and TRL's."""
    length = config.sequence_length
    cut = f"cuts sequences at {length} tokens and"
    return {
        "fixed": f"trains on sequences of {length} tokens",
        "padded": f'{cut} pads all to that: `DataCollatorForSeq2Seq(…, padding="max_length", max_length={length})`',
        "dynamic_padding": f"{cut} pads each batch to its longest: `DataCollatorForSeq2Seq(…)`, TRL's default",
        "packed": f"{cut} concatenates those of a batch: `DataCollatorWithFlattening()`, or TRL's `padding_free=True`",
    }[config.batching]
