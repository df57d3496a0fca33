"""`TrialConfig`: one point of the search space, the value that travels from the space to the export."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Engine = Literal["deepspeed", "pytorch"]
Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal["none", "optimizer", "optimizer+parameters"]
ActivationCheckpointing = Literal["none", "full", "selective"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Scalar = bool | int | float | str

ENGINES: tuple[Engine, ...] = get_args(Engine)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialConfig:
    """What one trial runs. Whether it is legal is the space's question (`autotune.space.legality`)."""

    engine: Engine
    """Who runs the step: DeepSpeed's ZeRO engine, or plain PyTorch (DDP and FSDP2)."""
    gpus: int
    """World size: workers of the trial, one a GPU."""
    micro_batch_size: int
    """Sequences per data-parallel rank and forward pass."""
    sequence_length: int
    """Tokens a sequence."""
    precision: Precision = "bf16"
    """`bf16` and `fp16`: mixed precision with fp32 master weights and Adam state. `fp32`: everything in fp32."""
    zero_stage: int = 0
    """0..3. On `pytorch`: 0 = DDP, 2 = FSDP2 without reshard after forward, 3 = FSDP2 with it; 1 is refused there."""
    offload: Offload = "none"
    """What lives in host memory between uses."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """`full`: every decoder layer is recomputed in the backward pass; `selective`: every n-th."""
    selective_every: int | None = None
    """The n of `selective`; None otherwise."""
    attention: Attention = "sdpa"
    """Attention kernel, by its transformers name."""
    deepspeed: tuple[tuple[str, Scalar], ...] = ()
    """Further DeepSpeed keys as (dotted path, value), sorted by path, each once; empty on other engines."""

    def __post_init__(self) -> None:
        # 5e8 and 500000000 are one value: equal configs must have one fingerprint.
        whole = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in self.deepspeed}
        object.__setattr__(self, "deepspeed", tuple(sorted(whole.items(), key=lambda item: item[0])))

    @property
    def data_parallel_size(self) -> int:
        """Ranks that see different data. Equal to the world size until a layout splits the model itself."""
        return self.gpus

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        fields = dataclasses.asdict(self)
        fields["deepspeed"] = dict(self.deepspeed)
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**{**fields, "deepspeed": tuple(dict(fields.get("deepspeed") or {}).items())})

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that are equal exactly for equal configs; stable across runs and versions of Python."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def describe(self) -> str:
        """One short line for people: `deepspeed zero-3 bf16 mb 4 ckpt full`."""
        words = [self.engine, f"zero-{self.zero_stage}", self.precision, f"mb {self.micro_batch_size}"]
        if self.activation_checkpointing != "none":
            every = f"/{self.selective_every}" if self.selective_every else ""
            words.append(f"ckpt {self.activation_checkpointing}{every}")
        if self.offload != "none":
            words.append(f"offload {self.offload}")
        if self.attention != "sdpa":
            words.append(self.attention)
        return " ".join(words)
