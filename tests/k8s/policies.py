"""What the schemas do not say: the rules of the Ray operator, and the levels of Pod Security."""

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.kinds import Manifest, pod_templates

BASELINE_CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP",
    "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


def operator_errors(manifest: Manifest) -> list[str]:
    """Why KubeRay 1.7 would refuse a RayJob or RayCluster that its schema allows."""
    if manifest["kind"] not in ("RayJob", "RayCluster"):
        return []
    spec, is_job = manifest["spec"], manifest["kind"] == "RayJob"
    cluster = spec["rayClusterSpec"] if is_job else spec
    return [*_cluster_errors(cluster), *(_job_errors(spec, cluster) if is_job else [])]


def _cluster_errors(cluster: dict[str, Any]) -> Iterator[str]:
    head = cluster["headGroupSpec"]["template"]["spec"]
    groups = cluster.get("workerGroupSpecs", [])
    for group in groups:
        if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            yield f"group {group['groupName']}: replicas are not between their bounds"
        if not group["template"]["spec"]["containers"]:
            yield f"group {group['groupName']}: no container"
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(map(int, cluster.get("rayVersion", "0").split(".")[:2]))
        if version < (2, 52):
            yield "a token needs Ray 2.52"
        if cluster["authOptions"].get("enableK8sTokenAuth"):
            yield "Kubernetes' tokens are not for a RayJob"
    if any(variable["name"] == "RAY_REDIS_ADDRESS" for variable in head["containers"][0].get("env", [])):
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    for gate in ("networkPolicy", "tlsOptions", "historyServerOptions"):
        if gate in cluster:
            yield f"{gate} is behind a feature gate that is closed by default"


def _job_errors(job: dict[str, Any], cluster: dict[str, Any]) -> Iterator[str]:
    if job.get("suspend") and not job.get("shutdownAfterJobFinishes"):
        yield "a job that may be suspended must shut its cluster down"
    if job.get("ttlSecondsAfterFinished") and not job.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if job.get("shutdownAfterJobFinishes") and job.get("deletionStrategy", {}).get("deletionRules"):
        yield "shutdownAfterJobFinishes and deletionRules exclude each other"
    if job.get("clusterSelector") or (job["submissionMode"] == "InteractiveMode" and job.get("backoffLimit")):
        yield "no clusterSelector beside rayClusterSpec, no backoffLimit in InteractiveMode"
    if job["submissionMode"] == "SidecarMode":
        if job.get("submitterPodTemplate") or job.get("submitterConfig"):
            yield "SidecarMode has no submitterPodTemplate and no submitterConfig"
        if cluster["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "SidecarMode needs a head that is never restarted"


def kueue_errors(manifest: Manifest) -> list[str]:
    """Why Kueue's webhook would refuse a job that names a queue."""
    if "kueue.x-k8s.io/queue-name" not in manifest["metadata"].get("labels", {}):
        return []
    spec = manifest["spec"]
    errors = [] if spec.get("shutdownAfterJobFinishes") else ["Kueue wants shutdownAfterJobFinishes"]
    if spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
        errors.append("Kueue admits no autoscaling cluster")
    if len(spec["rayClusterSpec"]["workerGroupSpecs"]) > 17:
        errors.append("Kueue takes at most 18 pod sets, and the head is one")
    return errors


def pod_security_errors(manifest: Manifest, level: str) -> list[str]:
    """What a Pod Security level (`privileged`, `baseline` or `restricted`) forbids in the pods of a manifest."""
    return [f"{where}: {error}" for where, pod in pod_templates(manifest) for error in _pod_errors(pod["spec"], level)]


def _pod_errors(pod: dict[str, Any], level: str) -> Iterator[str]:
    if level == "privileged":
        return
    of_pod = pod.get("securityContext", {})
    for flag in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(flag):
            yield flag
    for volume in pod.get("volumes", []):
        kinds = volume.keys() - {"name"}
        if "hostPath" in kinds or (level == "restricted" and not kinds <= RESTRICTED_VOLUMES):
            yield f"volume {volume['name']}"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        own, name = container.get("securityContext", {}), container["name"]
        added, dropped = (set(own.get("capabilities", {}).get(key, [])) for key in ("add", "drop"))
        if own.get("privileged"):
            yield f"{name}: privileged"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name}: hostPort"
        if added - BASELINE_CAPABILITIES:
            yield f"{name}: capabilities {sorted(added - BASELINE_CAPABILITIES)}"
        if level != "restricted":
            continue
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: may gain privileges"
        if "ALL" not in dropped or added - {"NET_BIND_SERVICE"}:
            yield f"{name}: keeps capabilities"
        if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            yield f"{name}: may run as root"
        if own.get("runAsUser", of_pod.get("runAsUser")) == 0:
            yield f"{name}: runs as root"
        seccomp = own.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type")
        if seccomp not in ("RuntimeDefault", "Localhost"):
            yield f"{name}: no seccomp profile"


def habit_errors(manifest: Manifest) -> Iterator[str]:
    """What we ask of our own pods beyond that."""
    for where, template in pod_templates(manifest):
        pod = template["spec"]
        if pod.get("automountServiceAccountToken") is not False or pod.get("serviceAccountName") != "autotune":
            yield f"{where}: gets a token of the API server"
        for container in pod["containers"]:
            name, resources = container["name"], container.get("resources", {})
            for needed in ("cpu", "memory"):
                if not all(needed in resources.get(part, {}) for part in ("requests", "limits")):
                    yield f"{where} {name}: no request or limit of {needed}"
            if resources.get("requests", {}).get("memory") != resources.get("limits", {}).get("memory"):
                yield f"{where} {name}: memory beyond its request can be taken from it"
            image = container["image"]
            if "@sha256:" not in image and (":" not in image.rpartition("/")[2] or image.endswith(":latest")):
                yield f"{where} {name}: image {image} moves"
            for variable in container.get("env", []):
                if re.search("PASSWORD|TOKEN|SECRET|KEY", variable["name"]) and "value" in variable:
                    yield f"{where} {name}: {variable['name']} is no reference to a Secret"
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            missing = mounted - {volume["name"] for volume in pod.get("volumes", [])} - _claimed(manifest)
            if missing:
                yield f"{where} {name}: mounts {sorted(missing)}, which is no volume"


def _claimed(manifest: Manifest) -> set[str]:
    claims: list[dict[str, Any]] = manifest["spec"].get("volumeClaimTemplates", [])
    return {claim["metadata"]["name"] for claim in claims}
