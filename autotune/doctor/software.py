"""Python, packages, PyTorch against the driver, DeepSpeed's ops, compilers, and whether ranks can be forked."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from autotune.doctor.check import Finding, fail, ok, warn
from autotune.doctor.gpus import Driver, Gpu

DISTRIBUTION = "autotune-llm"
_IMPORTED = (
    "accelerate", "alembic", "deepspeed", "jinja2", "numpy", "optuna", "pydantic", "ray", "scipy", "sqlalchemy",
    "torch", "transformers", "typer",
)  # fmt: skip
TRIAL_OPS = ("cpu_adam", "fused_adam")
"""What a trial on a GPU builds: Adam with offload, and without. On a CPU nothing is built."""


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Python is one that we run on."""
    found = f"Python {'.'.join(map(str, version))} on {platform.system()} {platform.machine()}"
    if version < (3, 11):
        return fail(found, "install Python 3.11 or later")
    if platform.system() != "Linux":
        return fail(found, "run on Linux; from elsewhere, send the study to a cluster with `autotune submit`")
    return ok(found)


def check_packages(requirements: Sequence[str] | None = None) -> Finding:
    """Every package that we need is there, in a version that we work with.

    Args:
        requirements: as package metadata has them; those of the installed Autotune by default.
    """
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:  # a job that brought its code along
            return _importable()
    wrong, right = [], []
    for line in requirements:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if needed.specifier.contains(version, prereleases=True):
            right.append(f"{needed.name} {version}")
        else:
            wrong.append(f"{needed.name} {version} is not {needed.specifier}")
    if wrong:
        return fail("; ".join(wrong), f"pip install --upgrade {DISTRIBUTION}")
    shown = {"torch", "transformers", "accelerate", "deepspeed", "ray", "optuna", "sqlalchemy"}
    return ok(", ".join(name for name in right if name.split()[0] in shown))


def _importable() -> Finding:
    missing = [name for name in _IMPORTED if importlib.util.find_spec(name) is None]
    if missing:
        return fail(f"{', '.join(missing)} cannot be imported by {sys.executable}", f"pip install {DISTRIBUTION} there")
    return ok(f"{DISTRIBUTION} runs from a folder, so versions were not compared; all it imports is here")


def check_torch(libraries: dict[str, Any], driver: Driver | None) -> Finding:
    """PyTorch's CUDA runs on this driver and has kernels for these GPUs.

    Args:
        libraries: the answer of `probe.libraries`.
        driver: of this machine; None without GPUs.
    """
    version, cuda, nccl = libraries["torch"], libraries["cuda"], libraries["nccl"]
    build = f"CUDA {cuda}, NCCL {nccl}" if cuda else f"ROCm {libraries['hip']}" if libraries["hip"] else "CPU only"
    found = f"PyTorch {version} ({build})"
    if driver is None or not driver.gpus:
        return ok(found)
    runs = f"{driver.cuda[0]}.{driver.cuda[1]}"
    if cuda is None:
        return fail(
            f"{found}, but {len(driver.gpus)} NVIDIA GPUs are here",
            f"install a PyTorch for CUDA {runs} or older (https://pytorch.org/get-started)",
        )
    # Any minor version runs on a driver of the same major version (CUDA's minor version compatibility).
    if int(cuda.split(".")[0]) > driver.cuda[0]:
        return fail(
            f"{found}, but driver {driver.version} runs CUDA up to {runs}",
            f"upgrade the driver, or install a PyTorch for CUDA {driver.cuda[0]}",
        )
    without = [gpu for gpu in driver.gpus if not _has_kernels(gpu, libraries["architectures"])]
    if without:
        return fail(
            f"{found} has no kernels for {without[0].name} (sm_{without[0].capability[0]}{without[0].capability[1]})",
            "install a PyTorch build that lists this GPU's architecture",
        )
    if nccl is None:
        return fail(f"{found} has no NCCL", "install the PyTorch that pytorch.org builds for CUDA")
    return ok(f"{found} on driver {driver.version}, which runs CUDA up to {runs}")


def _has_kernels(gpu: Gpu, architectures: Sequence[str]) -> bool:
    """Binaries (`sm_`) run on later minor versions of their major one, intermediate code (`compute_`) on all later."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if built <= gpu.capability and (match[1] == "compute" or built[0] == gpu.capability[0]):
            return True
    return False


def check_ops(libraries: dict[str, Any], driver: Driver | None) -> Finding:
    """DeepSpeed's compiled ops are there, or can be built when a trial first needs them."""
    built, buildable = libraries["built_ops"], libraries["buildable_ops"]
    beyond = [name for name in libraries["known_ops"] if name not in built and name not in buildable]
    found = f"DeepSpeed {libraries['deepspeed']}: {len(built)} ops built, {len(buildable)} can be built"
    found += f", not {', '.join(beyond)}" if beyond else ""
    lacking = [name for name in TRIAL_OPS if name in beyond]
    if lacking and driver is not None and driver.gpus:
        return fail(f"{found}; trials need {', '.join(lacking)}", "see `ds_report` for what each op lacks")
    return ok(found)


def check_compilers(libraries: dict[str, Any], driver: Driver | None) -> Finding:
    """What builds DeepSpeed's ops. A machine without GPUs builds none."""
    nvcc = _nvcc()
    tools = {"ninja": shutil.which("ninja"), "C++": shutil.which(os.environ.get("CXX", "c++")), "nvcc": nvcc}
    missing = [name for name, path in tools.items() if path is None]
    found = ", ".join(f"{name} {'missing' if path is None else 'found'}" for name, path in tools.items())
    if driver is None or not driver.gpus or all(op in libraries["built_ops"] for op in TRIAL_OPS):
        return ok(f"{found}; trials here build nothing")
    if missing:
        return fail(
            f"{found}; engine deepspeed builds {' and '.join(TRIAL_OPS)} on first use",
            f"install {', '.join(missing)} and put it on the PATH (CUDA's toolkit has nvcc), or set engine: pytorch",
        )
    release = _nvcc_release(str(nvcc))
    if libraries["cuda"] and release and release.split(".")[0] != libraries["cuda"].split(".")[0]:
        return fail(
            f"{found}; nvcc is of CUDA {release}, PyTorch of CUDA {libraries['cuda']}: PyTorch refuses to build",
            f"install the CUDA {libraries['cuda']} toolkit, and set CUDA_HOME to it",
        )
    return ok(f"{found}, CUDA {release or 'unknown'}")


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def _nvcc_release(nvcc: str) -> str | None:
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30, check=False)
    match = re.search(r"release (\d+\.\d+)", run.stdout)
    return match[1] if match else None


def check_ranks(ranks: dict[str, Any]) -> Finding:
    """Ranks are forked from a process that has the libraries and has left CUDA alone.

    Args:
        ranks: the answer of `probe.ranks`.
    """
    if ranks["start_method"] == "forkserver":
        return ok(f"ranks start by fork: {ranks['reason']}")
    return warn(
        f"ranks start by {ranks['start_method']}, which costs every trial its imports: {ranks['reason']}",
        "trials run all the same; upgrade or remove the package that it names to make them start in a second",
    )
