"""The nodes of a Ray cluster: asked by `ask_nodes`, in a process that is connected, and judged by the checks."""

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from autotune.doctor.check import Check, Finding, Status, fail, ok, perform, warn
from autotune.predict.network import Group, network
from autotune.spec.cluster import identify_gpu
from autotune.units import format_bytes

NODE_SECONDS = 60.0
RESERVE_SECONDS = 60.0
ALL_REDUCE_SECONDS = 180.0
SLOW_SHARE = 0.5
"""Of the speed that the table of networks leads to; its own error on nodes that it was not fitted on may be a fifth."""


def ask_nodes(out: str) -> dict[str, Any]:
    """Ask every node of the connected cluster, and time an all-reduce over all its GPUs, or over its nodes on CPUs.

    Nothing is left behind. The GPUs are reserved while it lasts, so it waits for none that a study has.

    Args:
        out: folder that the nodes should share.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from autotune.doctor import node
    from autotune.doctor.all_reduce import Rank

    token = secrets.token_hex(4)
    alive = [found for found in ray.nodes() if found["Alive"]]

    def on_each(function: Callable[..., Any], *arguments: str) -> list[Any]:
        running = [
            ray.remote(function)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(found["NodeID"], soft=False))
            .remote(*arguments)
            for found in alive
        ]
        answers: list[Any] = []
        for reference in running:
            try:
                answers.append(ray.get(reference, timeout=NODE_SECONDS))
            except Exception as error:  # whatever Ray says of it is the finding
                answers.append({"error": _words(error)})
        return answers

    facts = on_each(node.examine, out, token)
    for fact, count in zip(facts, on_each(node.seen, out, token), strict=True):
        fact["seen"] = count if isinstance(count, int) else 0
    on_each(node.clean, out, token)
    for fact, found in zip(facts, alive, strict=True):
        fact |= {"address": found["NodeManagerAddress"], "ray_gpus": int(found["Resources"].get("GPU", 0))}

    places = [found for found in alive for _ in range(int(found["Resources"].get("GPU", 0)))]
    device = "cuda" if places else "cpu"
    places = places or alive
    answer: dict[str, Any] = {"nodes": facts, "device": device, "ranks": len(places)}
    if len(places) > 1:
        ranks = [
            ray.remote(Rank)
            .options(
                num_cpus=0,
                num_gpus=1 if device == "cuda" else 0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(found["NodeID"], soft=False),
            )
            .remote()
            for found in places
        ]
        try:
            host, port = ray.get([rank.address.remote() for rank in ranks], timeout=RESERVE_SECONDS)[0]
            measuring = [rank.measure.remote(i, len(ranks), host, port, device) for i, rank in enumerate(ranks)]
            measured = ray.get(measuring, timeout=ALL_REDUCE_SECONDS)
            answer["all_reduce"] = max(measured, key=lambda result: float(result["seconds"]))
        except Exception as error:
            answer["all_reduce"] = {"error": _words(error)}
        finally:
            for rank in ranks:
                ray.kill(rank)
    return answer


def check_cluster(ask: Callable[[], dict[str, Any]], out: str) -> Iterator[Check]:
    """Judge the nodes.

    Args:
        ask: returns what `ask_nodes` does; a cluster that cannot be asked is the only finding.
        out: the folder that they should share.
    """
    try:
        answer = ask()
        problem = answer.get("error")
    except RuntimeError as error:
        problem = str(error)
    if problem is not None:
        remedy = "check the address, RAY_AUTH_TOKEN, and that both sides run one version of Ray"
        yield Check("nodes", Status.FAIL, problem, remedy)
        return
    nodes = answer["nodes"]
    yield perform("nodes", lambda: check_nodes(nodes))
    nodes = [node for node in nodes if "error" not in node]
    for node in nodes:
        for check in node["checks"]:
            name = f"{node['address']}: {check['name']}"
            yield Check(name, Status(check["status"]), check["found"], check["remedy"])
    yield perform("versions", lambda: check_versions(nodes))
    yield perform("shared storage", lambda: check_storage(nodes, out))
    yield perform("all-reduce", lambda: check_all_reduce(answer))


def check_nodes(nodes: list[dict[str, Any]]) -> Finding:
    """Every node answers, shows Ray the GPUs that it has, and all have alike."""
    silent = [f"{node['address']} ({node['error']})" for node in nodes if "error" in node]
    found = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    if silent:
        return fail(
            f"{found}; no answer from {', '.join(silent)}", "install Autotune there as well, in the same Python as Ray"
        )
    hidden = [f"{n['address']} ({n['ray_gpus']} of {len(n['gpus'])})" for n in nodes if n["ray_gpus"] < len(n["gpus"])]
    if hidden:
        return warn(
            f"{found}; Ray was given fewer GPUs than there are on {', '.join(hidden)}",
            "start Ray with --num-gpus, or without CUDA_VISIBLE_DEVICES; in a container, with all GPUs",
        )
    kinds = Counter((len(node["gpus"]), name) for node in nodes for name in sorted(set(node["gpus"])))
    if len(kinds) > 1:
        listed = ", ".join(f"{number} x {gpus} {name}" for (gpus, name), number in sorted(kinds.items()))
        return warn(f"{found} that differ: {listed}", "keep a study to equal nodes; `cluster` in its file names them")
    [(gpus, name)] = kinds or [(0, "GPU")]
    return ok(f"{found}, {f'{gpus} x {name} each' if gpus else 'no GPUs'}")


def check_versions(nodes: list[dict[str, Any]]) -> Finding:
    """All nodes run the same."""
    wrong = []
    for package in sorted({package for node in nodes for package in node["versions"]}):
        found = Counter(node["versions"].get(package, "missing") for node in nodes)
        if len(found) > 1:
            usual = found.most_common(1)[0][0]
            odd = {node["address"]: node["versions"].get(package, "missing") for node in nodes}
            wrong.append(f"{package} {usual}, but {', '.join(f'{v} on {a}' for a, v in odd.items() if v != usual)}")
    if wrong:
        return fail("; ".join(wrong), "run one image, or one environment from one lock file, on every node")
    return ok(", ".join(f"{name} {version}" for name, version in (nodes[0]["versions"] if nodes else {}).items()))


def check_storage(nodes: list[dict[str, Any]], out: str) -> Finding:
    """All nodes can write to the folder, and see what the others wrote."""
    failed = [f"{node['address']} ({node['storage']})" for node in nodes if node["storage"]]
    if failed:
        return fail(
            f"{out} cannot be written on {', '.join(failed)}",
            "mount it there, writable for Ray's user, or name another",
        )
    blind = [node["address"] for node in nodes if node["seen"] < len(nodes)]
    if blind:
        return warn(
            f"{out} can be written on every node, but is not the same folder on {', '.join(blind)}",
            "trials' logs then stay on the node that ran them; name a folder that all nodes mount to have them all",
        )
    return ok(f"{out} can be written on {len(nodes)} node{'s' if len(nodes) > 1 else ''}, and is one folder")


def check_all_reduce(answer: dict[str, Any]) -> Finding:
    """The ranks find each other, add up rightly, and are as fast as the table of networks says."""
    ranks, nodes = answer["ranks"], len(answer["nodes"])
    if "all_reduce" not in answer:
        return ok("one GPU, or one node without any: nothing to add up")
    result = answer["all_reduce"]
    if "error" in result:
        return fail(
            f"{ranks} ranks on {nodes} nodes: {result['error']}",
            "end what holds the GPUs; between nodes, open all ports to each other, and name the interface that they"
            " share in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says where it hangs",
        )
    size, seconds = float(result["bytes"]), float(result["seconds"])
    bus = 2 * (ranks - 1) / ranks * size / seconds  # github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md
    found = f"{ranks} ranks on {nodes} node{'s' if nodes > 1 else ''}: {format_bytes(size)} in {seconds * 1e3:.3g} ms"
    found += f", bus bandwidth {bus / 1e9:.3g} GB/s"
    gpu_nodes = [node for node in answer["nodes"] if node.get("gpus")]
    gpu = identify_gpu(gpu_nodes[0]["gpus"][0], gpu_nodes[0]["total_bytes"]) if gpu_nodes else None
    if answer["device"] == "cpu":
        return ok(f"{found} (gloo; there is no table for CPUs)")
    if gpu is None:
        return ok(f"{found}; the hardware table does not know this GPU, so nothing to compare with")
    group = Group(np.array([ranks]), np.array([len(gpu_nodes)]))
    expected = float(network(gpu).all_reduce(group, np.array([size]))[0])
    found += f", {expected / seconds:.0%} of what the hardware table leads to"
    if expected / seconds >= SLOW_SHARE:
        return ok(found)
    if len(gpu_nodes) > 1:
        return warn(
            found,
            "see in NCCL_DEBUG=INFO whether it goes over NET/IB or over NET/Socket; for InfiniBand give the pods or"
            " containers the devices and unlimited locked memory, and name the adapters in NCCL_IB_HCA",
        )
    return warn(found, "see `nvidia-smi topo -m` and `nvidia-smi nvlink --status`: GPUs may talk over PCIe")


def _words(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if "Timeout" in type(error).__name__:
        return "no answer in time; the GPUs may be reserved by a study"
    return f"{type(cause).__name__}: {lines[0] if lines else 'no reason given'}"[:300]
