"""Asking a foreign library what it makes of a file: without leaving a trace, and without trusting its silence."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


@contextmanager
def asking() -> Iterator[None]:
    """Import and call a library as in a process that nobody launched and that has no GPU; then undo what it set.

    Importing DeepSpeed looks for an accelerator, and would initialise CUDA in a process that must not. A launcher's
    variables would make transformers start a process group. transformers and accelerate hand settings on through the
    environment. All of it is put back: Ray's workers inherit the environment, and they do want the GPU. Warnings are
    for those who train, not for those who check.
    """
    before = dict(os.environ)
    silenced = logging.root.manager.disable
    for name in before:
        if name in _LAUNCHERS or name.startswith(_PREFIXES):
            del os.environ[name]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(silenced)
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name in (name for name, value in before.items() if os.environ.get(name) != value):
            os.environ[name] = before[name]


def one_line(error: Exception) -> str:
    """What the library said, as part of a sentence."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
    return " ".join(str(error).split())


class Recording(dict[str, Any]):
    """A dictionary that remembers which of its keys were asked for, its sections too.

    Libraries read much of a config key by key, each with a default: a typo changes nothing and says nothing. Which keys
    they read is not written down anywhere, so they are handed this.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        super().__init__(
            {key: Recording(value) if isinstance(value, dict) else value for key, value in document.items()}
        )
        self.given = tuple(document)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """See `dict.get`."""
        self.asked.add(key)
        return super().get(key, default)

    @property
    def ignored(self) -> list[str]:
        """Keys it was made of that nobody asked for."""
        return [key for key in self.given if key not in self.asked]
