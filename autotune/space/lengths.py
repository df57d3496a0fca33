"""The lengths of a study's sequences: read from a file or drawn from a distribution, and how they are batched."""

import re
from pathlib import Path

from autotune.errors import InvalidSpaceError, shown
from autotune.space.file import LognormalFile, WorkloadFile
from autotune.space.rule import Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload, lognormal_lengths, typical_lengths

MAX_BYTES = 256 * 1024**2
"""Of a file of lengths: some tens of millions of sequences."""


def read_lengths(workload: WorkloadFile, folder: Path, where: str) -> tuple[int, ...]:
    """The lengths that a workload names, see `Workload.lengths`.

    Raises:
        InvalidSpaceError: the file is missing, too large, or has something else than lengths.
    """
    if workload.lengths == "fixed":
        return ()
    if isinstance(workload.lengths, LognormalFile):
        return lognormal_lengths(workload.lengths.lognormal.median, workload.lengths.lognormal.sigma)
    path = folder / workload.lengths.file
    key = f"{where}: workload.lengths.file"
    try:
        if not path.is_file():
            raise InvalidSpaceError(
                f"{key}: found {shown(str(path))}, which is no file; write a length in tokens a line"
            )
        if path.stat().st_size > MAX_BYTES:
            raise InvalidSpaceError(f"{key}: {path} has more than {MAX_BYTES} bytes; some thousand lengths suffice")
        lines = path.read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise InvalidSpaceError(f"{key}: {path} cannot be read ({error.strerror})") from None
    wrong = next((line for line in lines if not re.fullmatch(r"[1-9]\d{0,8}", line, re.ASCII)), None)
    if wrong is not None or not lines:
        found = "nothing" if wrong is None else shown(wrong)
        raise InvalidSpaceError(f"{key}: found {found} in {path}; write a length in tokens a line")
    return typical_lengths([int(line) for line in lines])


@reads("batching", "attention", "micro_batch_size")
def _batching(config: TrialConfig, workload: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.batching == "fixed" and workload.lengths:
        return "batching fixed is for sequences of one length, and workload.lengths says that they differ"
    if config.batching != "fixed" and not workload.lengths:
        return f"batching {config.batching} is for sequences that differ in length; say workload.lengths"
    if config.batching == "packed" and config.micro_batch_size == 1:
        return "batching packed with micro_batch_size 1 is dynamic_padding: one sequence has nothing to be packed with"
    if config.batching == "packed" and config.attention == "eager":
        return "batching packed needs attention sdpa or a flash kernel, not eager"
    return None


@reads("batching", "tensor_parallel_size", "sequence_parallel_size", "pipeline_parallel_size", "loss")
def _whole_model(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.batching != "fixed" and config.has_own_layout:
        return f"batching {config.batching} does not go with {config.own_layout}, which cuts sequences of one length"
    return None


LENGTH_RULES: tuple[Rule, ...] = (_batching, _whole_model)
