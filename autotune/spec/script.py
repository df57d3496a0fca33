"""`ScriptRun`: the user's own training script, as a trial starts it."""

from dataclasses import dataclass
from typing import Literal

Launch = Literal["rank", "node"]
"""`rank`: the command is run once a GPU, with the variables that torchrun sets. `node`: once a node; it is a launcher
(torchrun, accelerate launch, deepspeed), which starts the ranks itself."""
Accumulation = Literal["short", "whole"]
"""What a screening trial runs of an optimizer step. `short`: a few of its micro-steps, which the script reports one by
one. `whole`: all of them; the script need report no more than optimizer steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRun:
    """A command whose words hold placeholders such as `{micro_batch_size}` (`autotune.formats.script`)."""

    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    """Further variables, whose values may hold placeholders too."""
    launch: Launch = "rank"
    accumulation: Accumulation = "short"
    folder: str = "."
    """Where the command is run: that of the search-space file."""
    model: str = ""
    """The model as the search-space file names it."""
