"""`ParallelMesh`: who shares what. Ranks in four dimensions: pipeline, data, sequence, tensor.

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
    sequence: DeviceMesh
    tensor: DeviceMesh


def data_parallel_mesh(device_type: str, ranks: int) -> DeviceMesh:
    """All ranks in one dimension. Its table of ranks is read, so it is real even where tensors are fake."""
    with unset_fake_temporarily():
        return init_device_mesh(device_type, (ranks,))


def parallel_mesh(device_type: str, config: TrialConfig) -> ParallelMesh:
    """The mesh of a config's degrees; its ranks are the whole world, which is `config.gpus`."""
    with unset_fake_temporarily():
        mesh = init_device_mesh(
            device_type,
            (
                config.pipeline_parallel_size,
                config.data_parallel_size,
                config.sequence_parallel_size,
                config.tensor_parallel_size,
            ),
            mesh_dim_names=("pipeline", "data", "sequence", "tensor"),
        )
        return ParallelMesh(
            pipeline=mesh["pipeline"],
            replicas=mesh["data", "sequence"]._flatten("replicas"),
            sequence=mesh["sequence"],
            tensor=mesh["tensor"],
        )
