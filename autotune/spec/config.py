"""`TrialConfig`: one point of the search space, the value that travels from the space to the export."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Engine = Literal["deepspeed", "pytorch"]
Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal[
    "none",
    "optimizer",
    "optimizer+parameters",
    "optimizer_nvme",
    "optimizer_nvme+parameters",
    "optimizer_nvme+parameters_nvme",
]
ActivationCheckpointing = Literal["none", "full", "selective", "selective_ops"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
PipelineSchedule = Literal["1f1b", "interleaved_1f1b", "zero_bubble"]
Loss = Literal["full_logits", "chunked"]
Optimizer = Literal["adamw", "adamw_8bit", "adamw_torch_8bit"]
Method = Literal["full", "lora", "qlora"]
LoraTargets = Literal["all-linear", "attention", "mlp"]
DeviceMap = Literal["none", "auto"]
Batching = Literal["fixed", "padded", "dynamic_padding", "packed"]
Scalar = bool | int | float | str

STAGES_PER_RANK: dict[PipelineSchedule, int] = {"1f1b": 1, "interleaved_1f1b": 2, "zero_bubble": 2}
"""Pipeline stages of one rank, by schedule."""

KEPT_OPERATORS = (
    "aten.mm.default",
    "aten.addmm.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
)
"""Of `torch.ops`: what `selective_ops` does not compute twice. FlashAttention-2's kernel is not one of them."""

FLASH_ATTENTION: tuple[Attention, ...] = ("flash_attention_2", "flash_attention_3")
"""Kernels of Dao et al., which are told where sequences begin and take no mask."""

WITHIN_SEQUENCES: tuple[Attention, ...] = (*FLASH_ATTENTION, "flex_attention")
"""Kernels that do no work between packed sequences."""

SECOND_PARTITION = "zero_optimization.zero_hpz_partition_size"
"""DeepSpeed's key of ZeRO++'s hpZ."""

GATHERED_LIMITS = ("zero_optimization.stage3_max_live_parameters", "zero_optimization.stage3_max_reuse_distance")
"""DeepSpeed's keys of how many elements ZeRO-3 keeps gathered for their next use."""

MOST_GATHERED = 10**9
"""Elements; DeepSpeed 0.19's own for both of `GATHERED_LIMITS`, runtime/zero/config.py."""

SUB_GROUP_KEY = "zero_optimization.sub_group_size"
"""DeepSpeed's key of how many elements of a rank's partition ZeRO-3 updates at a time."""

SUB_GROUP_SIZE = 10**9
"""Elements; DeepSpeed 0.19's own, runtime/zero/config.py."""

REDUCE_SCATTER = "zero_optimization.reduce_scatter"
"""DeepSpeed's key of how ZeRO-3 divides gradients: by a reduce-scatter, which is its default, or an all-reduce."""

ZERO_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients")
"""Fields, named like DeepSpeed's keys: what ZeRO-3 sends as small integers (ZeRO++)."""

MLP_TILES = 8
"""Pieces of a sequence, or of what a rank has of it, for which `tiled_mlp` computes an MLP one after another. ALST's
guides take as many as `hidden_size` goes into the length, rounded up: 7 of 32,768 tokens of Qwen3-32B."""
SHORT_STATES: tuple[Optimizer, ...] = ("adamw_8bit", "adamw_torch_8bit")
"""Under which Adam's two states have 8 bits."""

ENGINES: tuple[Engine, ...] = get_args(Engine)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

LATER_FIELDS: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "sequence_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "pipeline_schedule": None,
    "loss": "full_logits",
    "script": {},
    "data_parallel_replicate_size": 1,
    "method": "full",
    "lora_rank": None,
    "lora_alpha": None,
    "lora_target_modules": None,
    "batching": "fixed",
    "optimizer": "adamw",
    **dict.fromkeys(ZERO_QUANTIZED, False),
    "torch_compile": False,
    "use_liger_kernel": False,
    "fp8": False,
    "device_map": "none",
    "tiled_mlp": False,
}
"""Fields that the first stores did not know, with their defaults. A default is not written, so that a config has the
fingerprint under which such a store knows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What one trial runs. Whether it is legal is the space's question (`autotune.space.legality`)."""

    engine: Engine
    """Who runs the step: DeepSpeed's ZeRO engine, or plain PyTorch (DDP and FSDP2)."""
    gpus: int
    """That the trial holds: the world size, one rank a GPU, except with `device_map: auto`."""
    micro_batch_size: int
    """Sequences per data-parallel rank and forward pass."""
    sequence_length: int
    """Tokens a sequence."""
    precision: Precision = "bf16"
    """`bf16` and `fp16`: mixed precision with fp32 master weights and Adam state. `fp32`: everything in fp32."""
    zero_stage: int = 0
    """0..3. On `pytorch`: 0 = DDP, 2 = FSDP2 without reshard after forward, 3 = FSDP2 with it; 1 is refused there."""
    offload: Offload = "none"
    """What lives in host memory between uses; with `_nvme`, in files on a disk of the node."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """`full`: every decoder layer is recomputed in the backward pass; `selective`: every n-th; `selective_ops`: every
    one, except for its matrix products and its attention, whose results are kept."""
    selective_every: int | None = None
    """The n of `selective`; None otherwise."""
    attention: Attention = "sdpa"
    """Attention kernel, by its transformers name."""
    tensor_parallel_size: int = 1
    """Ranks that share every weight matrix of a layer, and between the matrices the sequence."""
    sequence_parallel_size: int = 1
    """Ranks that share one sequence, and inside attention the heads (Ulysses)."""
    pipeline_parallel_size: int = 1
    """Ranks that share the layers, each some of them in a row."""
    pipeline_schedule: PipelineSchedule | None = None
    """In which order a pipeline runs its micro-batches; None without a pipeline."""
    loss: Loss = "full_logits"
    """`chunked`: the logits are computed, and recomputed in the backward pass, a piece of the sequence at a time."""
    data_parallel_replicate_size: int = 1
    """Groups of data-parallel ranks with a whole copy of the model each: FSDP2 shards within a group (HSDP)."""
    method: Method = "full"
    """What trains: `full` all weights; `lora` low-rank adapters beside frozen weights in the compute dtype; `qlora` the
    same beside weights held in 4 bits (nf4, double quantisation)."""
    lora_rank: int | None = None
    """Inner width of an adapter; None without adapters, like the two below."""
    lora_alpha: int | None = None
    """An adapter counts alpha / rank times."""
    lora_target_modules: LoraTargets | None = None
    """Which matrices have an adapter: those of attention, of the MLP, or both (`all-linear`, never the lm head)."""
    batching: Batching = "fixed"
    """How sequences of different lengths become a micro-batch. `fixed`: they have one length. `padded`: to
    `sequence_length`; `dynamic_padding`: to the longest of the micro-batch. `packed`: one after another in one row."""
    optimizer: Optimizer = "adamw"
    """`adamw`: Adam's two states are fp32. `adamw_8bit`: they have 8 bits a value, by bitsandbytes. `adamw_torch_8bit`:
    the same by torchao, which takes sharded tensors and compiles its update. The name is the Trainer's."""
    zero_quantized_weights: bool = False
    """ZeRO-3 gathers parameters as 8-bit integers (ZeRO++'s qwZ)."""
    zero_quantized_gradients: bool = False
    """ZeRO-3 reduces gradients over nodes as 4-bit integers (ZeRO++'s qgZ)."""
    torch_compile: bool = False
    """Each layer, and each of the modules around them, is compiled by itself (accelerate's regional compilation)."""
    use_liger_kernel: bool = False
    """Norms, rotary embeddings, SwiGLU and the loss are Liger's Triton kernels; logits are computed a few rows at a
    time. The name is the Trainer's."""
    fp8: bool = False
    """Matrix products of the layers, but for the first, read fp8 values with one scale a tensor, found as they are cast
    (torchao's dynamic tensorwise scaling). Weights, gradients and all the rest are as `precision` says."""
    device_map: DeviceMap = "none"
    """`auto`: one process has all GPUs, each some layers in a row, and they work one after another, as transformers'
    `from_pretrained(…, device_map="auto")` arranges it; `none`: each GPU has a process of its own."""
    tiled_mlp: bool = False
    """The MLP of each layer is computed, and recomputed in the backward pass, for one of `MLP_TILES` pieces of the
    sequence at a time (ALST's tiled MLP)."""
    deepspeed: tuple[tuple[str, Scalar], ...] = ()
    """Further DeepSpeed keys as (dotted path, value), sorted by path, each once; empty on other engines."""
    script: tuple[tuple[str, Scalar], ...] = ()
    """Knobs of the user's own script as (name, value), sorted by name, each once; empty without one."""

    def __post_init__(self) -> None:
        # 5e8 and 500000000 are one value: equal configs must have one fingerprint.
        for group in ("deepspeed", "script"):
            whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in getattr(self, group)}
            object.__setattr__(self, group, tuple(sorted(whole.items(), key=lambda item: item[0])))

    @property
    def ranks(self) -> int:
        """Processes of the trial."""
        return 1 if self.device_map == "auto" else self.gpus

    @property
    def gpus_per_rank(self) -> int:
        """That one process works on."""
        return self.gpus // self.ranks

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same data: one each of tensor, sequence and pipeline parallel ranks."""
        return self.tensor_parallel_size * self.sequence_parallel_size * self.pipeline_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data; 0 where there are not enough for one of them."""
        return self.ranks // self.model_parallel_size

    @property
    def replicas(self) -> int:
        """Ranks that have the same parameters and different tokens: what DDP replicates over and ZeRO shards over."""
        return self.data_parallel_size * self.sequence_parallel_size

    @property
    def shards(self) -> int:
        """Ranks that ZeRO divides the states over: the replicas, or a group of them."""
        return self.replicas // self.data_parallel_replicate_size

    @property
    def pipeline_stages(self) -> int:
        """Pieces that the layers are cut into."""
        per_rank = 1 if self.pipeline_schedule is None else STAGES_PER_RANK[self.pipeline_schedule]
        return self.pipeline_parallel_size * per_rank

    @property
    def has_own_layout(self) -> bool:
        """The model is split, or its loss is, in a way that transformers' Trainer does not do."""
        return self.model_parallel_size > 1 or self.loss != "full_logits"

    @property
    def own_layout(self) -> str:
        """What makes `has_own_layout` true, in the words of the space file; empty where it is not."""
        sizes = ("tensor_parallel_size", "sequence_parallel_size", "pipeline_parallel_size")
        found = [f"{name} {getattr(self, name)}" for name in sizes if getattr(self, name) > 1]
        return " with ".join(found + ([f"loss {self.loss}"] if self.loss != "full_logits" else []))

    @property
    def is_never_padded(self) -> bool:
        """A micro-batch has no padding whatever the lengths, and no mask."""
        return self.batching == "fixed" or (self.batching == "dynamic_padding" and self.micro_batch_size == 1)

    def data_parallel_rank(self, rank: int) -> int:
        """Whose data a rank sees. Ranks are counted in the order of the mesh (pipeline, data, sequence, tensor)."""
        return rank // (self.sequence_parallel_size * self.tensor_parallel_size) % self.data_parallel_size

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        fields = dataclasses.asdict(self)
        fields |= {"deepspeed": dict(self.deepspeed), "script": dict(self.script)}
        return {key: value for key, value in fields.items() if LATER_FIELDS.get(key, ...) != value}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            TypeError: a field is missing or unknown.
        """
        groups = {group: tuple(dict(fields.get(group) or {}).items()) for group in ("deepspeed", "script")}
        return cls(**{**fields, **groups})

    @property
    def swaps(self) -> bool:
        """Whether optimizer states, at least, are offloaded to a disk."""
        return self.offload.startswith("optimizer_nvme")

    @property
    def offloads_parameters(self) -> bool:
        """Whether parameters are offloaded besides optimizer states, to main memory or to a disk."""
        return "+parameters" in self.offload

    @property
    def swaps_parameters(self) -> bool:
        """Whether they are offloaded to a disk, as the states are."""
        return self.offload == "optimizer_nvme+parameters_nvme"

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that are equal exactly for equal configs; stable across runs and versions of Python."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One short line for people: `deepspeed zero-3 bf16 mb 4 ckpt full`."""
        words = [self.engine, f"zero-{self.zero_stage}", self.precision, f"mb {self.micro_batch_size}"]
        if self.method != "full":
            words.insert(0, f"{self.method} r{self.lora_rank} {self.lora_target_modules}")
        if self.activation_checkpointing != "none":
            every = f"/{self.selective_every}" if self.selective_every else ""
            words.append(f"ckpt {self.activation_checkpointing}{every}")
        if self.offload != "none":
            words.append(f"offload {self.offload}")
        if self.attention != "sdpa":
            words.append(self.attention)
        degrees = {
            "replicate": self.data_parallel_replicate_size,
            "tp": self.tensor_parallel_size,
            "sp": self.sequence_parallel_size,
            "pp": self.pipeline_parallel_size,
        }
        words += [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
        if self.pipeline_schedule is not None:
            words.append(self.pipeline_schedule)
        if self.loss != "full_logits":
            words.append(f"{self.loss} loss")
        if self.batching != "fixed":
            words.append(self.batching)
        if self.optimizer != "adamw":
            words.append(self.optimizer)
        words += ["qwZ"] * self.zero_quantized_weights + ["qgZ"] * self.zero_quantized_gradients
        if self.torch_compile:
            words.append("compiled")
        if self.use_liger_kernel:
            words.append("liger")
        if self.fp8:
            words.append("fp8")
        if self.device_map != "none":
            words.append(f"device_map {self.device_map}")
        if self.tiled_mlp:
            words.append("tiled mlp")
        words += [f"{name} {value}" for name, value in self.script]
        return " ".join(words)
