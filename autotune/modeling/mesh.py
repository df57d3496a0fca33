"""`ParallelMesh`: who shares what. Ranks in dimensions: pipeline, data in groups, sequence, tensor.

Tensor-parallel ranks are neighbours, so that they share a node's fast links: they talk in every layer. Pipeline stages
are farthest apart: they exchange one activation a micro-batch. (Narayanan et al., arXiv:2104.04473, section 3.2.)
"""

from dataclasses import dataclass

from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autotune.spec.config import TrialConfig


@dataclass(frozen=True)
class ParallelMesh:
    """The dimensions that one rank belongs to. Rank numbers: see `TrialConfig.data_parallel_rank`."""

    pipeline: DeviceMesh
    replicas: DeviceMesh
    """Data and sequence dimension as one: equal parameters, different tokens."""
    sharding: DeviceMesh
    """What FSDP2 takes: `replicas`, or two dimensions, groups of them and the ranks of a group."""
    sequence: DeviceMesh
    tensor: DeviceMesh


def data_parallel_mesh(device_type: str, config: TrialConfig) -> DeviceMesh:
    """All ranks in one dimension, or in two: groups with a whole model each, and the ranks of a group, which are
    neighbours. Its table of ranks is read, so it is real even where tensors are fake.
    """
    groups = config.data_parallel_replicate_size
    with unset_fake_temporarily():
        if groups == 1:
            return init_device_mesh(device_type, (config.gpus,))
        return init_device_mesh(device_type, (groups, config.shards), mesh_dim_names=("groups", "shards"))


def parallel_mesh(device_type: str, config: TrialConfig) -> ParallelMesh:
    """The mesh of a config's degrees; its ranks are the whole world, which is `config.gpus`."""
    groups = config.data_parallel_replicate_size
    with unset_fake_temporarily():
        mesh = init_device_mesh(
            device_type,
            (
                config.pipeline_parallel_size,
                groups,
                config.data_parallel_size // groups,
                config.sequence_parallel_size,
                config.tensor_parallel_size,
            ),
            mesh_dim_names=("pipeline", "groups", "data", "sequence", "tensor"),
        )
        shards = mesh["data", "sequence"]._flatten("shards")
        replicas = mesh["groups", "data", "sequence"]._flatten("replicas")
        return ParallelMesh(
            pipeline=mesh["pipeline"],
            replicas=replicas,
            sharding=shards if groups == 1 else mesh["groups", "shards"],
            sequence=mesh["sequence"],
            tensor=mesh["tensor"],
        )
