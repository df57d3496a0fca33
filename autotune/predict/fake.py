"""A trial's training step without a device, without memory and without peers: what tracing runs.

The engine is the one that trials run, built by `build_engine`. Its tensors are FakeTensors, which have shapes and
storages of the right size and no data, and its process group only pretends to have other ranks. Every allocation so
happens in the order of a real step, and can be watched by a dispatch mode; `MemoryTracker` finds the peak that it would
find in the trial.

The libraries read data in a few places, or look behind the tensors. Those are answered here, each by what a healthy
step on real data would see: `FakeData` and the replacements below. Nothing in the engines knows of it.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
import transformers.integrations.deepspeed
import transformers.integrations.flex_attention
import transformers.masking_utils
from torch._C._distributed_c10d import _register_comm_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import schedules
from torch.distributed.tensor._redistribute import _gen_transform_infos
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import autotune.engines.device_map
import autotune.modeling.build
from autotune.engines.engine import Engine, build_engine
from autotune.predict import flex, liger
from autotune.predict.compiled import separate_compilation, without_kernels
from autotune.predict.fake_mode import CPU, FakeData
from autotune.spec.config import Batching, TrialConfig
from autotune.spec.outcome import Phase
from autotune.spec.request import TrialRequest

_MORE: dict[Batching, tuple[str, ...]] = {
    "fixed": (),
    "padded": ("labels", "attention_mask"),
    "dynamic_padding": ("labels", "attention_mask"),
    "packed": ("labels", "position_ids"),
}
"""Further inputs of the model, see `autotune.engines.batches.collated`; each is as large as the token ids."""


@dataclass(frozen=True, slots=True)
class FakeTrial:
    """One rank of a trial, built and ready to step."""

    engine: Engine
    request: TrialRequest

    def run(self, plan: Iterable[bool], on_phase: Callable[[Phase], None] = lambda phase: None) -> None:
        """Run micro-steps, as a trial would.

        Args:
            plan: True for each micro-step that ends in an update.
            on_phase: told of each phase when it begins.
        """
        config, workload = self.request.config, self.request.workload
        at_once = workload.gradient_accumulation_steps(config) // workload.micro_steps(config)
        for boundary in plan:
            input_ids = torch.empty(at_once * config.micro_batch_size, config.sequence_length, dtype=torch.int64)
            more = {name: torch.empty_like(input_ids) for name in _MORE[config.batching]}
            on_phase(Phase.FORWARD)
            loss = self.engine.forward(input_ids, boundary=boundary, **more)
            on_phase(Phase.BACKWARD)
            self.engine.backward(loss, boundary=boundary)
            if boundary:
                on_phase(Phase.OPTIMIZER)
                self.engine.update()
            del loss, input_ids, more


@contextmanager
def fake_trial(
    request: TrialRequest, observer: TorchDispatchMode, rank: int = 0, placed: Mapping[str, int] | None = None
) -> Iterator[FakeTrial]:
    """Build one rank of a trial on FakeTensors, and tear everything down on leaving.

    Takes the whole process: there is one default process group, and libraries are changed meanwhile. DeepSpeed decides
    on its first import what device it is for; a process that traces must not have told it of CUDA.

    Args:
        request: the trial. Its device and limits play no part.
        observer: the dispatch mode that sees every operator, from building on.
        rank: whose step it is. Ranks differ by how partitions fall on parameters.
        placed: on which GPU each module is, of a process with several; None for where the engine would put them.

    Raises:
        RuntimeError: this process is in a process group already, or DeepSpeed is for another device.
        UsageError: see the engines.
    """
    if dist.is_initialized():
        raise RuntimeError("a step can be traced only in a process that has no process group")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of deprecated calls inside the libraries, and of `data_ptr` being 0
        stack.enter_context(_environment_restored())
        os.environ.setdefault("DS_ACCELERATOR", CPU.type)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=request.config.ranks)
        stack.callback(_leave_group, request)
        if request.config.swaps:  # folders are made, nothing is written
            request = replace(request, nvme_path=stack.enter_context(TemporaryDirectory(prefix="autotune-trace-")))
        for owner, name, substitute in _substitutes(request):
            stack.enter_context(_replaced(owner, name, substitute))
        if placed is not None:
            where = dict(placed)
            stack.enter_context(_replaced(autotune.engines.device_map, "balanced_map", lambda model, config: where))
        if request.config.torch_compile or request.config.optimizer == "adamw_torch_8bit":
            stack.enter_context(separate_compilation())
            for owner, name, substitute in without_kernels([FakeData, type(observer)]):
                stack.enter_context(_replaced(owner, name, substitute))
        stack.enter_context(FakeData())
        stack.enter_context(observer)
        yield FakeTrial(build_engine(request, CPU), request)


def _numbered(config: TrialConfig, first: torch.device) -> list[torch.device]:
    return [first, *(torch.device(first.type, at) for at in range(1, config.gpus))]


def _packed_sequences(position_ids: torch.Tensor) -> torch.Tensor:
    """As transformers finds them, without a look at whether there are any."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _substitutes(request: TrialRequest) -> Iterator[tuple[Any, str, Any]]:
    """(owner, name, substitute) of the functions that cannot work without data."""
    # Weights have no values.
    for module in (autotune.modeling.build, autotune.engines.device_map):
        yield module, "write_initial_weights", lambda *args, **kwargs: None
    # Of a host's CPUs PyTorch makes one device, but FakeTensors may be on as many as there are numbers.
    yield autotune.engines.device_map, "devices_of", _numbered
    # Whether a row has several sequences, and whether any is padded, is looked up in the values. transformers does not
    # look where it believes to be traced, and then makes a mask that no step on sequences of one length has.
    find = _packed_sequences if request.config.batching == "packed" else lambda position_ids: None
    yield transformers.masking_utils, "find_packed_sequence_indices", find
    if request.config.batching in ("padded", "dynamic_padding"):
        yield transformers.masking_utils, "_ignore_causal_mask_sdpa", lambda *args, **kwargs: False
    if request.config.attention == "flex_attention":
        yield transformers.integrations.flex_attention, "compile_friendly_flex_attention", flex.attend
        yield transformers.masking_utils, "create_block_mask", flex.block_mask
    if request.config.method == "qlora":
        from bitsandbytes import functional

        from autotune.modeling import quantized

        yield quantized, "initial_weight", lambda name, shape, device, *_: torch.empty(*shape, device=device)
        # A table that the library makes from numbers once and keeps: real, and not a later trial's.
        yield functional, "name2qmap", {"dynamic": functional.create_dynamic_map()}
    if request.config.use_liger_kernel:  # Triton's kernels run on GPUs, and Liger need not be installed
        from transformers.integrations import liger as integration

        yield integration, "apply_liger_kernel", liger.stand_in
        yield liger.rotary_module(request.model.config["model_type"]), "apply_rotary_pos_emb", liger.rotate
    if request.config.engine == "pytorch":
        # Tables of ranks are read, so they are real: those that FSDP2 makes of two meshes as well.
        yield DeviceMesh, "__init__", _on_real_tensors(DeviceMesh.__init__)
        # What is sent lives as long as a schedule keeps what it waited for, which gloo's requests hold on to.
        yield schedules, "_batch_p2p", _holding(schedules._batch_p2p)
        # Compares shapes over the ranks, in C++ and by address.
        yield ddp, "_verify_param_shape_across_processes", lambda *args, **kwargs: None
        yield ddp.DistributedDataParallel, "_ddp_init_helper", _with_fake_reducer(ddp.DistributedDataParallel)
    else:
        import deepspeed.runtime.engine
        import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
        import deepspeed.utils.nvtx
        from deepspeed.accelerator import get_accelerator
        from deepspeed.sequence import cross_entropy

        from autotune.engines import deepspeed as engine

        yield engine, "write_partitioned_weights", lambda *args: None
        # Under ZeRO-3 all are gathered to be initialised, whatever the engine asks for.
        yield transformers.integrations.deepspeed, "initialize_weights_zero3", lambda model: None
        yield coordinator, "assert_ints_same_as_other_ranks", lambda ints: None
        # Ranks begin with equal weights. Sends each parameter, into itself.
        yield deepspeed.runtime.engine.DeepSpeedEngine, "_broadcast_model", lambda self: None
        # Names for debugging, by weak references, with which a FakeTensor cannot be replaced in place.
        yield deepspeed.runtime.engine, "debug_extract_module_and_param_names", lambda model: None
        # ZeRO-3 puts its own there and leaves it; the trial ends with its process, and this one goes on to others.
        yield torch.nn.functional, "linear", torch.nn.functional.linear
        # The host's processor decides nothing here.
        yield type(get_accelerator()), "is_fp16_supported", lambda self: True
        # Marks for a profiler, around thousands of calls.
        yield deepspeed.utils.nvtx, "enable_nvtx", False
        # Before the first step it would compare what tensor parallel ranks were given.
        yield deepspeed.runtime.engine.DeepSpeedEngine, "_configure_tensor_parallel_states", _share_matrices
        # The shares of a vocabulary are compared over ranks.
        tensor = request.config.tensor_parallel_size
        yield cross_entropy, "_validate_vocab_shard_bounds", lambda size, *args: size * tensor
        # Where sequences are shared, DeepSpeed puts its attention in the place of another, and the engine a collective.
        yield ALL_ATTENTION_FUNCTIONS, "_local_mapping", dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
        yield torch.distributed.nn.functional, "all_gather", torch.distributed.nn.functional.all_gather
        # It asks `numactl`, for each bucket that ZeRO-3 reduces.
        yield type(get_accelerator()), "device_count", lambda self: request.config.gpus
        if request.config.ranks == 1 and request.config.offloads_parameters:
            from deepspeed.runtime.zero import partition_parameters

            yield (
                partition_parameters,
                "_no_gather_coalesced",
                _gathered_apart(partition_parameters._no_gather_coalesced),
            )
        if request.config.swaps:
            from deepspeed.runtime.swap_tensor import (
                partitioned_optimizer_swapper,
                partitioned_param_swapper,
                pipelined_optimizer_swapper,
            )

            for swapper in (partitioned_optimizer_swapper, pipelined_optimizer_swapper, partitioned_param_swapper):
                yield swapper, "AsyncIOBuilder", _DiskBuilder
            # Of this machine's limits and disk.
            yield engine, "require_locked_memory", lambda *args: None
            yield engine, "require_aligned_gradients", lambda *args: None


def _gathered_apart(gather: Callable[..., Any]) -> Callable[..., Any]:
    """What a single rank does in the place of gathering: on a GPU it copies up what is in main memory."""

    def called(parameters: Iterable[torch.nn.Parameter]) -> Any:
        parameters = list(parameters)
        handle = gather(parameters)
        for parameter in parameters:
            parameter.data = parameter.data.clone()
        return handle

    return called


class _DiskBuilder:
    """Stands for DeepSpeed's op `async_io`, with a disk that takes everything and says it is done."""

    def load(self, verbose: bool = True) -> "_DiskBuilder":
        return self

    def aio_handle(self, **settings: Any) -> "_Disk":
        return _Disk()


@dataclass(slots=True)
class _Disk:
    pinned: set[int] = field(default_factory=set)
    """Storages of its buffers."""
    pending: int = 0

    def new_cpu_locked_tensor(self, numel: int, example: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty(numel, dtype=example.dtype)
        self.pinned.add(buffer.untyped_storage()._cdata)
        return buffer

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        self.pending += 1
        return 0

    async_pwrite = async_pread

    def wait(self) -> int:
        done, self.pending = self.pending, 0
        return done


def _share_matrices(engine: Any, model: torch.nn.Module) -> None:
    """What DeepSpeed's engine does to share matrices over ranks, but for a look at their data."""
    from deepspeed.utils import groups

    engine._set_client_model(model)
    engine.mpu = groups
    with _disable_current_modes():  # the table of ranks is read
        groups._init_tp_mesh_device(tensor_model_parallel_size=engine.autotp_size())


def _on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*args, **kwargs)

    return called


@dataclass(frozen=True, slots=True)
class _Held:
    """A request that is done, with its tensors."""

    tensors: list[torch.Tensor]

    def wait(self) -> None:
        pass


def _holding(batch: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def called(operations: list[Any], desc: str | None = None) -> list[Any]:
        works = batch(operations, desc)
        return [*works, _Held([operation.tensor for operation in operations])] if operations else works

    return called


def _with_fake_reducer(cls: Any) -> Callable[..., None]:
    """DDP's initialisation, followed by what spares its reducer the reading of data."""
    original = cls._ddp_init_helper

    def reduce(state: None, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        # DDP's own hook waits for a result that a pretended all-reduce does not have.
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def init_helper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _register_comm_hook(self.reducer, None, reduce)
        self.reducer = _FixedBuckets(self.reducer)

    return init_helper


class _FixedBuckets:
    """A DDP reducer that keeps its first buckets. Others, of as many bytes, follow the order of the first backward."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


@contextmanager
def _replaced(owner: Any, name: str, substitute: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, substitute)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """DeepSpeed's engine reads its place from the environment, which the engine sets."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _leave_group(request: TrialRequest) -> None:
    # What DTensor remembers of operators names process groups, and a mesh of the next trial is equal to one of this.
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    _gen_transform_infos.cache_clear()
    if request.config.engine == "deepspeed":
        import deepspeed.comm

        if deepspeed.comm.is_initialized():  # else it never came so far
            deepspeed.comm.destroy_process_group()  # torch's, and what it keeps of it
            return
    dist.destroy_process_group()
