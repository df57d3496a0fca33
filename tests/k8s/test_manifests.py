"""Every overlay of `k8s/`: rendered by kustomize; every object checked by schema, operators' rules and for security.

KubeRay's own schemas are read from the folder that KUBERAY_CRDS names, which holds its `ray.io_*.yaml` files, or from
`shared/crds` beside the checkout; the shapes in `kinds.py` are checked always. No API server takes part.
"""

import copy
import functools
import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.k8s.kinds import Manifest, pod_templates, schema_errors
from tests.k8s.policies import habit_errors, kueue_errors, operator_errors, pod_security_errors

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "crds"))
SPACES = {
    "single-node-8xh100": "qwen3-32b-sft-8xh100",
    "multi-node-kueue": "qwen2.5-32b-sft-16xa100",
    "multi-node-volcano": "qwen2.5-32b-sft-16xa100",
}


@functools.cache
def rendered(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    tools = {"kubectl": ["kubectl", "kustomize"], "kustomize": ["kustomize", "build"]}
    command = next((command for tool, command in tools.items() if shutil.which(tool)), None)
    if command is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    run = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


def overlay(name: str) -> list[Manifest]:
    return copy.deepcopy(rendered(K8S / "overlays" / name))


def one(manifests: list[Manifest], kind: str) -> Manifest:
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def errors_of(manifests: list[Manifest]) -> list[str]:
    """Everything that is wrong."""
    level = one(manifests, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    errors = []
    for manifest in manifests:
        wrong = schema_errors(manifest)
        if not wrong:  # the others take a well-formed manifest
            wrong += [*operator_errors(manifest), *kueue_errors(manifest), *habit_errors(manifest)]
            wrong += pod_security_errors(manifest, level)
        errors += wrong
    return errors


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_right_in_every_object(name: str) -> None:
    assert errors_of(overlay(name)) == []


@pytest.mark.parametrize("name", ["kueue", "volcano"])
def test_what_an_administrator_applies(name: str) -> None:
    for manifest in yaml.safe_load_all((K8S / "admin" / f"{name}.yaml").read_text()):
        assert schema_errors(manifest) == []


def test_the_pod_that_reads_results() -> None:
    pod = yaml.safe_load((K8S / "files-pod.yaml").read_text())
    assert schema_errors(pod) == []
    assert pod_security_errors(pod, "restricted") == []
    assert list(habit_errors(pod)) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_pod_needs_more_than_restricted_but_for_rdma(name: str) -> None:
    found = [error for manifest in overlay(name) for error in pod_security_errors(manifest, "restricted")]
    rdma = [
        "worker group gpu: ray-worker: capabilities ['IPC_LOCK']",
        "worker group gpu: ray-worker: keeps capabilities",
    ]
    assert found == (rdma if name == "multi-node-volcano" else [])


def in_job(manifests: list[Manifest]) -> dict[str, Any]:
    job: dict[str, Any] = one(manifests, "RayJob")["spec"]
    return job


def worker(manifests: list[Manifest]) -> dict[str, Any]:
    pod: dict[str, Any] = in_job(manifests)["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    return pod


TYPOS: dict[str, Callable[[list[Manifest]], object]] = {
    "a key of the job": lambda m: in_job(m).update(submissionmode="SidecarMode"),
    "a mode": lambda m: in_job(m).update(submissionMode="Sidecar"),
    "a number as text": lambda m: in_job(m).update(backoffLimit="2"),
    "a key of the cluster": lambda m: in_job(m)["rayClusterSpec"].update(rayversion="2.60.0"),
    "a key of a group": lambda m: in_job(m)["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplica=1),
    "a key of a pod": lambda m: worker(m).update(nodeselector={}),
    "a key of resources": lambda m: worker(m)["containers"][0]["resources"].update(limit={}),
    "a key of a policy": lambda m: next(x for x in m if x["kind"] == "NetworkPolicy")["spec"].update(egres=[]),
    "a kind": lambda m: one(m, "PersistentVolumeClaim").update(kind="PersistentVolumesClaim"),
    "a rule of the operator": lambda m: in_job(m).update(shutdownAfterJobFinishes=False),
    "an operator's rule on the head": lambda m: in_job(m)["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(
        restartPolicy="Always"
    ),
    "privilege": lambda m: worker(m)["containers"][0]["securityContext"].update(privileged=True),
    "a folder of the host": lambda m: worker(m)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "a password in the open": lambda m: worker(m)["containers"][0]["env"].append({"name": "PGPASSWORD", "value": "x"}),
    "no limit": lambda m: worker(m)["containers"][0]["resources"]["limits"].pop("memory"),
    "an image that moves": lambda m: worker(m)["containers"][0].update(image="autotune:latest"),
    "a volume that is not there": lambda m: worker(m)["volumes"].pop(0),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_planted_mistake_is_found(typo: str) -> None:
    manifests = overlay("single-node-8xh100")
    TYPOS[typo](manifests)
    assert errors_of(manifests) != []


@functools.cache
def crd(kind: str) -> Any:
    """KubeRay's schema of a kind, made strict: a key that it does not know is an error."""
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's schemas are not in {CRDS}: name their folder with KUBERAY_CRDS")
    with path.open() as file:
        versions = yaml.load(file, Loader=yaml.CSafeLoader)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(schema) | {"additionalProperties": False})


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        key: value for key, value in schema.items() if not key.startswith("x-") and key not in ("format", "nullable")
    }
    if "properties" in schema:
        kept["properties"] = {
            name: {"type": "object"} if name == "metadata" else strict(part)
            for name, part in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            kept[key] = strict(schema[key])
    return kept


def crd_errors(manifests: list[Manifest]) -> list[str]:
    ours = [manifest for manifest in manifests if manifest["apiVersion"] == "ray.io/v1"]
    return [error.message for manifest in ours for error in crd(manifest["kind"]).iter_errors(manifest)]


@pytest.mark.parametrize("name", OVERLAYS)
def test_kuberay_s_own_schemas(name: str) -> None:
    manifests = overlay(name)
    assert any(manifest["apiVersion"] == "ray.io/v1" for manifest in manifests)
    assert crd_errors(manifests) == []


@pytest.mark.parametrize("typo", ["a key of the job", "a number as text", "a key of a group", "a key of a pod"])
def test_kuberay_s_own_schemas_find_a_planted_mistake(typo: str) -> None:
    manifests = overlay("single-node-8xh100")
    TYPOS[typo](manifests)
    assert crd_errors(manifests) != []


def test_versions_agree() -> None:
    [pinned] = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    version = pinned.removeprefix("ray==")
    assert version == importlib.metadata.version("ray")
    for name in OVERLAYS:
        for manifest in overlay(name):
            if manifest["apiVersion"] != "ray.io/v1":
                continue
            spec = manifest["spec"]
            assert spec.get("rayClusterSpec", spec)["rayVersion"] == version
            for _, template in pod_templates(manifest):
                assert template["spec"]["containers"][0]["image"].endswith(f"-ray{version}")
    assert f"-ray{version} " in (ROOT / "Dockerfile").read_text()
    pod = yaml.safe_load((K8S / "files-pod.yaml").read_text())
    assert pod["spec"]["containers"][0]["image"].endswith(f"-ray{version}")


@pytest.mark.parametrize(("name", "space"), SPACES.items())
def test_a_job_runs_the_study_that_it_names(name: str, space: str) -> None:
    manifests = overlay(name)
    maps = {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == "ConfigMap"}
    text = maps["study"]["data"]["space.yaml"]
    assert text == (ROOT / "search_spaces" / f"{space}.yaml").read_text()
    job, cluster = in_job(manifests), yaml.safe_load(text)["cluster"]
    assert yaml.safe_load(text)["study"] == job["metadata"]["study"] == space
    assert job["jobId"] == f"autotune-{space}-1"  # what `autotune status` looks for
    for key in ("store", "out"):
        assert f"--{key} {job['metadata'][key]} " in job["entrypoint"]
    [group] = job["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == cluster["nodes"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == str(cluster["gpus_per_node"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_is_let_in_by_accident(name: str) -> None:
    policies = [manifest["spec"] for manifest in overlay(name) if manifest["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    for policy in policies:
        for rule in policy.get("ingress", []):
            assert rule.get("from"), "an empty `from` is everybody"
            for source in rule["from"]:
                assert source.get("podSelector") or source.get("namespaceSelector"), source
