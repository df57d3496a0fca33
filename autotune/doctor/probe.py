"""Answers that need heavy libraries, from a process of its own: `python -m autotune.doctor.probe QUESTION ARGUMENT`.

Importing them takes seconds, prints, and may initialise CUDA; none of that belongs into the process that asks.
The answer is the last line of stdout, as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any


def ask(question: str, argument: str, *, seconds: float) -> dict[str, Any]:
    """Ask in a new process.

    Args:
        question: `libraries` or `ranks`, with the device type; `cluster`, with Ray's address; `nodes`, with a JSON list
            of that address and the folder that the nodes should share.
        argument: see `question`.
        seconds: after which there is no answer.

    Raises:
        RuntimeError: the process died, or did not answer in time; the message has its last words.
    """
    command = [sys.executable, "-m", "autotune.doctor.probe", question, argument]
    with tempfile.TemporaryDirectory(prefix="autotune-doctor-") as scratch:
        environment = os.environ | _environment(question, argument, scratch)
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, errors="replace", env=environment, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no answer within {seconds:.0f} s") from None
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines:
        words = run.stderr.strip().splitlines() or [f"it exited with {run.returncode} and without a word"]
        raise RuntimeError(words[-1])
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _environment(question: str, argument: str, scratch: str) -> dict[str, str]:
    if question in ("cluster", "nodes"):
        return {}
    from autotune.trial.pool import trial_environment

    # An empty folder of extensions: nothing of the user's is swept. PyTorch makes its cache when it is imported.
    return trial_environment("cuda" if argument == "cuda" else "cpu", scratch) | {"TORCHINDUCTOR_CACHE_DIR": scratch}


def libraries(_device: str) -> dict[str, Any]:
    """PyTorch's build and DeepSpeed's ops, as ranks on this device would find them."""
    import torch

    build: Any = torch._C
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        # Unlike torch.cuda.get_arch_list, this needs no device.
        "architectures": (build._cuda_getArchFlags() or "").split() if torch.version.cuda else [],
        "nccl": None,
    }
    if hasattr(build, "_nccl_version"):
        nccl: Any = torch.cuda.nccl
        facts["nccl"] = ".".join(str(part) for part in nccl.version()[:3])
    import deepspeed
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    facts["deepspeed"] = deepspeed.__version__
    facts["built_ops"] = sorted(name for name, built in installed_ops.items() if built)
    facts["buildable_ops"] = sorted(name for name, compatible in compatible_ops.items() if compatible)
    facts["known_ops"] = sorted(name for name in compatible_ops if name != "deepspeed_not_implemented")
    return facts


def ranks(device: str) -> dict[str, Any]:
    """How ranks start here: a real pool forks a real child, which looks for CUDA that its parent touched."""
    from autotune.trial.pool import NodePool

    pool = NodePool(device="cuda" if device == "cuda" else "cpu", log_dir=os.environ["TORCH_EXTENSIONS_DIR"])
    try:
        return dict(pool.ready())
    finally:
        pool.shutdown()


def cluster(address: str) -> dict[str, Any]:
    """The nodes of a Ray cluster, or why it does not answer."""
    from autotune.errors import ClusterError
    from autotune.search.authentication import authenticate

    authenticate(address)
    import ray

    from autotune.search.cluster import connected

    try:
        with connected(address, None):
            return {"nodes": [node["Resources"] for node in ray.nodes() if node["Alive"]]}
    except ClusterError as error:
        return {"error": str(error)}


def nodes(argument: str) -> dict[str, Any]:
    """What the nodes of a Ray cluster say of themselves (`autotune.doctor.cluster.ask_nodes`), or why it is silent."""
    from autotune.errors import ClusterError
    from autotune.search.authentication import authenticate

    address, out = json.loads(argument)
    authenticate(address)
    from autotune.doctor.cluster import ask_nodes
    from autotune.search.cluster import connected

    try:
        with connected(address, None):
            return ask_nodes(out)
    except ClusterError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    answers = {"libraries": libraries, "ranks": ranks, "cluster": cluster, "nodes": nodes}
    sys.stdout.write("\n" + json.dumps(answers[sys.argv[1]](sys.argv[2])) + "\n")
