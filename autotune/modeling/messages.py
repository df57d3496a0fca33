"""`Messages`: lets a finished message of torch.distributed hold no memory.

Gloo's threads drop a message's tensors some time after its `wait` has returned: microseconds, or, where the host has
more to do than cores, long after the caller has gone on and given the tensors up itself. How many bytes live at one
time would then depend on the host's scheduler, from run to run. NCCL has no such threads. So gloo works on tensors that
do not own their memory; the owners are held here, and only until the message has finished.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import Work, _register_work, _resolve_process_group
from torch.distributed.distributed_c10d import GroupName
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only


class Messages:
    """The messages of one process that have not finished."""

    def __init__(self) -> None:
        self._owners: list[tuple[torch.futures.Future[Any], list[torch.Tensor]]] = []  # what each reads and writes

    def send(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator that `threads_work_on`."""
        lent: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id of what gloo gets -> that, and its owner

        def lend(owner: torch.Tensor) -> torch.Tensor:
            if not _is_lent(owner):
                return owner
            borrower = _without_ownership(owner)
            lent[id(borrower)] = borrower, owner
            return borrower

        def give_back(tensor: torch.Tensor) -> torch.Tensor:
            return lent[id(tensor)][1] if id(tensor) in lent else tensor

        result = func(*tree_map_only(torch.Tensor, lend, args), **tree_map_only(torch.Tensor, lend, kwargs))
        work = result[-1] if isinstance(result, tuple) else result
        if lent and isinstance(work, torch.ScriptObject):
            owners = [owner for _, owner in lent.values()]
            self._owners.append((torch._C._distributed_c10d.Work.unbox(work).get_future(), owners))
        return tree_map_only(torch.Tensor, give_back, result)

    def send_functional(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call one of the `FUNCTIONAL` operators, DTensor's, whose result `wait_tensor` waits for.

        PyTorch makes that result and lets gloo own it, so the message that it would send is sent here. A reduce-scatter
        is left alone, as in `threads_work_on`.
        """
        tensor, *how = args
        if kwargs or not _is_lent(tensor) or (isinstance(how[0], str) and how[0] != "sum"):
            return func(*args, **kwargs)
        tensor = tensor.contiguous()
        result, send = FUNCTIONAL[func](tensor, *how)
        work = send(_without_ownership(result), _without_ownership(tensor))
        self._owners.append((work.get_future(), [result, tensor]))
        _register_work(result, work)
        return result

    def let_go(self) -> None:
        """Of what has finished."""
        if self._owners:
            self._owners = [(arrival, owners) for arrival, owners in self._owners if not arrival.done()]


IN_FLIGHT = Messages()
"""Of the process, not of who watches it: gloo may still write when the watcher has gone."""


Sent = tuple[torch.Tensor, Callable[[torch.Tensor, torch.Tensor], Work]]
"""A result, still empty, and what sends a message: (the result, the input) -> the work."""


def _all_gather(tensor: torch.Tensor, ranks: int, group: GroupName) -> Sent:
    result = tensor.new_empty(tensor.shape[0] * ranks, *tensor.shape[1:])
    return result, _resolve_process_group(group)._allgather_base


def _all_reduce(tensor: torch.Tensor, _sum: str, group: GroupName) -> Sent:
    return tensor.clone(), lambda out, _given: _resolve_process_group(group).allreduce([out])


_FUNCTIONAL = torch.ops._c10d_functional
FUNCTIONAL: dict[Any, Callable[..., Sent]] = {
    _FUNCTIONAL.all_gather_into_tensor.default: _all_gather,
    _FUNCTIONAL.all_reduce.default: _all_reduce,
}


def unseen(wait: Callable[..., bool]) -> Callable[..., bool]:
    """A `Work.wait` that no dispatch mode sees.

    In it gloo copies a reduce-scatter's result out of a copy of the whole input, which its threads go on holding, and
    which NCCL does not make.
    """

    def wait_unseen(*arguments: Any) -> bool:
        with _disable_current_modes():
            return wait(*arguments)

    return wait_unseen


def threads_work_on(func: Any, args: Any) -> bool:
    """Whether gloo gives this operator to a thread of its own, and its caller does not read the result from the thread.

    The first is so with all collectives of torch.distributed but reduce-scatter, whose last part runs in the `wait` of
    the caller. The second leaves out an all-reduce that is not waited for at once: DDP goes on with the tensors that
    its future brings. They are its buckets, which live as long as itself.
    """
    if func is torch.ops.c10d.allreduce_.default:
        return len(args) > _ASYNCHRONOUS and args[_ASYNCHRONOUS] is False
    return bool(func.namespace == "c10d" and func.__name__.startswith(_IN_THREADS))


_ASYNCHRONOUS = 4
"""Place of that argument; arguments that have their default, as this one when True, may be left out."""
_IN_THREADS = (
    "allgather",
    "_allgather",
    "allreduce_coalesced",
    "alltoall",
    "broadcast",
    "gather",
    "reduce_.",
    "scatter",
)


def _is_lent(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _without_ownership(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), storage.device, storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(same, tensor.storage_offset(), tensor.size(), tensor.stride())
