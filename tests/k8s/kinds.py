"""What the manifests may say: the shape of each kind, written down from its reference, every unknown key refused.

Built-in kinds and pod templates are checked by Kubernetes' own schemas (the package kubernetes-validate). Of the kinds
that operators add, the fields that we use are here: KubeRay 1.7, the Prometheus operator, Kueue 0.19, Volcano.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import kubernetes_validate
from pydantic import BaseModel, ConfigDict, Field, ValidationError

KUBERNETES = "1.32"
Manifest = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTPE]i?)?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: Name | None = None


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    template: Manifest


class WorkerGroup(Strict):
    groupName: Name
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=0)]
    rayStartParams: dict[str, str]
    template: Manifest


class RayClusterSpec(Strict):
    rayVersion: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(Strict):
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    jobId: str
    entrypoint: str
    metadata: dict[str, str]
    backoffLimit: Annotated[int, Field(ge=0)]
    preRunningDeadlineSeconds: Annotated[int, Field(gt=0)]
    activeDeadlineSeconds: Annotated[int, Field(gt=0)]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    rayClusterSpec: RayClusterSpec


class Selector(Strict):
    matchLabels: dict[str, str]


class Relabeling(Strict):
    action: Literal["replace"]
    sourceLabels: list[str]
    targetLabel: str


class Endpoint(Strict):
    port: Annotated[str, Field(max_length=15)]
    relabelings: list[Relabeling]


class PodMonitorSpec(Strict):
    selector: Selector
    podMetricsEndpoints: list[Endpoint]


class Rule(Strict):
    alert: str | None = None
    record: str | None = None
    expr: str
    for_: str | None = Field(None, alias="for")
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class RuleGroup(Strict):
    name: str
    rules: list[Rule]


class PrometheusRuleSpec(Strict):
    groups: list[RuleGroup]


class LocalQueueSpec(Strict):
    clusterQueue: Name


class Quota(Strict):
    name: str
    nominalQuota: int | Quantity


class FlavorQuotas(Strict):
    name: Name
    resources: list[Quota]


class ResourceGroup(Strict):
    coveredResources: list[str]
    flavors: list[FlavorQuotas]


class ClusterQueueSpec(Strict):
    namespaceSelector: dict[str, Any]
    resourceGroups: list[ResourceGroup]


class QueueSpec(Strict):
    weight: int
    reclaimable: bool
    capability: dict[str, Quantity]


class ResourceFlavorSpec(Strict):
    nodeLabels: dict[str, str] = {}


SPECS: dict[tuple[str, str], type[Strict]] = {
    ("ray.io/v1", "RayCluster"): RayClusterSpec,
    ("ray.io/v1", "RayJob"): RayJobSpec,
    ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitorSpec,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PrometheusRuleSpec,
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): LocalQueueSpec,
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): ClusterQueueSpec,
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): ResourceFlavorSpec,
    ("scheduling.volcano.sh/v1beta1", "Queue"): QueueSpec,
}


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """(where, pod template) of everything in a manifest that becomes pods."""
    spec = manifest.get("spec", {})
    cluster = spec.get("rayClusterSpec", spec)
    if "headGroupSpec" in cluster:
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs", []):
            yield f"worker group {group['groupName']}", group["template"]
    elif "template" in spec:
        yield "template", spec["template"]
    elif manifest["kind"] == "Pod":
        yield "pod", manifest


def schema_errors(manifest: Manifest) -> list[str]:
    """Why the API server, or the operator's own schema, would not take a manifest."""
    where = f"{manifest['kind']}/{manifest['metadata']['name']}"
    spec = SPECS.get((manifest["apiVersion"], manifest["kind"]))
    if spec is None:
        return _built_in(where, manifest)
    errors = [f"{where}: unknown key {key}" for key in manifest.keys() - {"apiVersion", "kind", "metadata", "spec"}]
    for model, part in ((Metadata, manifest["metadata"]), (spec, manifest.get("spec", {}))):
        try:
            model.model_validate(part)
        except ValidationError as error:
            errors += [f"{where}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    if not errors:
        for name, template in pod_templates(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"] | {"name": "x"}}
            errors += _built_in(f"{where} {name}", pod | {k: v for k, v in template.items() if k != "metadata"})
    return errors


def _built_in(where: str, manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{where}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{where}: no kind of Kubernetes {KUBERNETES}, and none that this file describes"]
    return []
