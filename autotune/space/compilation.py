"""The rules of `torch_compile`: what compiled layers go with, and what compiles them."""

import importlib.util
import os
import shutil

from autotune.space.attention import DRIVER
from autotune.space.layouts import SPLIT_MODEL_TYPES
from autotune.space.rule import DEGREES, Rule, reads
from autotune.spec.cluster import ClusterSpec
from autotune.spec.config import TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload


def missing_compiler(cluster: ClusterSpec) -> str | None:
    """What torch's inductor needs and this machine has not got, in words that follow "needs"; None where all is there.

    Of triton a machine without NVIDIA's driver, which only plans, says nothing.
    """
    compiler = os.environ.get("CXX", "g++")
    if cluster.device == "cpu" and shutil.which(compiler) is None:
        return f"a C++ compiler on CPUs, and {compiler} is not on the PATH"
    if cluster.device == "cuda" and DRIVER.exists() and importlib.util.find_spec("triton") is None:
        return "triton, which is not installed: it comes with PyTorch's builds for CUDA"
    return None


@reads("torch_compile")
def _compiler(config: TrialConfig, _work: Workload, _model: ModelSpec, cluster: ClusterSpec) -> str | None:
    missing = missing_compiler(cluster) if config.torch_compile else None
    return None if missing is None else f"torch_compile needs {missing}"


@reads("torch_compile", "engine", "loss", *DEGREES)
def _engine(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.torch_compile:
        return None
    if config.engine != "pytorch":
        return "torch_compile is run by engine pytorch alone"
    return f"torch_compile does not go with {config.own_layout}" if config.has_own_layout else None


@reads("torch_compile", "method")
def _layers(config: TrialConfig, _work: Workload, model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if not config.torch_compile:
        return None
    if config.method == "qlora":
        return "torch_compile cannot look into what bitsandbytes does for method qlora"
    if model.model_type not in SPLIT_MODEL_TYPES:
        known = ", ".join(SPLIT_MODEL_TYPES)
        return f"torch_compile is for models of type {known}, and {model.name} is {model.model_type}"
    return None


@reads("torch_compile", "activation_checkpointing")
def _operators(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.torch_compile and config.activation_checkpointing == "selective_ops":
        # torch/_dynamo/convert_frame.py: "non-infra torch dispatch mode present, this is not supported today"
        return "activation_checkpointing selective_ops watches operators, and with it torch_compile compiles nothing"
    return None


@reads("torch_compile", "batching")
def _shapes(config: TrialConfig, _work: Workload, _model: ModelSpec, _cluster: ClusterSpec) -> str | None:
    if config.torch_compile and config.batching in ("dynamic_padding", "packed"):
        return f"torch_compile would compile each length anew that batching {config.batching} comes to; use padded"
    return None


COMPILATION_RULES: tuple[Rule, ...] = (_compiler, _engine, _layers, _operators, _shapes)
