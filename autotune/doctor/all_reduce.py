"""An all-reduce over the ranks of a cluster, timed. `Rank` runs in a process of Ray's that holds its GPU."""

import datetime
import socket
import time
from typing import Any

ELEMENTS = 64 * 1024**2
"""fp32: 256 MiB, where NCCL reaches its bandwidth."""
CPU_ELEMENTS = 4 * 1024**2
REPEATS = 10


class Rank:
    """One rank."""

    def address(self) -> tuple[str, int]:
        """Where the others may meet if this is the first: the node's address and a port that is free now."""
        import ray

        host: str = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as opened:
            return host, int(opened.getsockname()[1])

    def measure(self, rank: int, size: int, host: str, port: int, device: str) -> dict[str, Any]:
        """Seconds that an all-reduce of so many bytes takes, the median of some; the sum is checked.

        Raises:
            RuntimeError: the ranks do not find each other, or the sum is wrong.
        """
        import torch
        import torch.distributed as dist

        cuda = device == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=60),
        )
        try:
            place = torch.device("cuda", 0) if cuda else torch.device("cpu")
            tensor = torch.ones(ELEMENTS if cuda else CPU_ELEMENTS, device=place)
            seconds = []
            for _ in range(REPEATS + 2):  # the first ones connect
                tensor.fill_(1.0)
                if cuda:
                    torch.cuda.synchronize()
                begun = time.perf_counter()
                dist.all_reduce(tensor)
                if cuda:
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begun)
            if not bool((tensor == size).all()):
                raise RuntimeError(f"the sum of {size} ones is not {size} on rank {rank}")
            return {"bytes": tensor.numel() * 4, "seconds": sorted(seconds[2:])[REPEATS // 2]}
        finally:
            dist.destroy_process_group()
