"""How long one optimizer step of a trial takes: DDP, FSDP2 and DeepSpeed's ZeRO, with offload and checkpointing, and
models that are split over ranks.

With the letters of `roofline.py`, for a micro-batch:

    matmul              of frozen weights without the gradient of the weight; adapters as in `adapters.py`
    elementwise         also the casts of fp32 weights, where an engine keeps such
    accumulation        bytes of adding gradients to their sum
    recomputation       the forward pass of what is checkpointed, or all of it but products and attention; what tiled
                        MLPs take longer (`tiled_mlp.py`)
    launch              max(0, the processor's seconds to issue the work - the GPU's to do it)

    logits              one more forward pass of the head where the loss is chunked
    tensor parallel     over t ranks: a layer gathers value·n·h bytes before and scatters as many after attention and
                        MLP, in each pass; embedding and head once. DeepSpeed's AutoTP sums as many bytes after each of
                        the two, and gathers whole logits unless the head is the embedding; what each rank then does
                        with all of them is left out. Over u ranks that share sequences (Ulysses, Jacobs et al.,
                        arXiv:2309.14509): n/u tokens a rank, and q, k, v and the result exchanged in each pass
    pipeline transfer   value·n·h/t bytes to the next stage, and back, for each stage of a rank; of GPUs of one process
                        that work in turn (`device_map`) as many to each but the first, and back, and the logits from
                        the last to the first. The process issues all layers, and hooks in them

and for the step:

    bubble              (p - 1) micro-batches of a stage under 1F1B, half of it with two stages a rank, a sixth where
                        weights' gradients fill the gaps (Narayanan et al., arXiv:2104.04473, section 2.2; Qi et al.,
                        arXiv:2401.10241, table 1, its three passes taken as equal)

    gradient reduction  max(0, reduction - the backward pass that hides it), where an engine hides it; over groups of
                        ranks that shard (HSDP), a sum of each shard besides
    parameter gather    of ZeRO-1 and 2 after the update; FSDP2 and ZeRO-3 for each layer, max(0, gather - the layer);
                        with ZeRO++'s hpZ, but for a step's first pass, over the ranks of the second copy
    optimizer           bytes of norm, clipping, AdamW and copy
    offload             gradients and parameters over PCIe, and the processor's Adam; to a disk, also what an update
                        reads and writes of it, and what each pass reads of parameters, one after the other
                        (`autotune.spec.nvme`)

of which accumulation, reduction and optimizer are of what trains, the gathering of sharded parameters of all.

Left out: the data loader, logging, evaluation, checkpoints, clocks that fall with heat, slow ranks, other jobs.
Sources: torch/distributed/fsdp/_fully_shard, DeepSpeed runtime/zero/stage_1_and_2.py and stage3.py, accelerate.
"""

from dataclasses import replace

import numpy as np

from autotune.predict.adapters import AdapterWork, layer_parameters
from autotune.predict.kernels import Values, peak_flops
from autotune.predict.network import Counts, group, host_link, network
from autotune.predict.roofline import (
    EAGER_SCORE_BYTES,
    TRANSFORMERS_KERNELS,
    KernelProfile,
    LayerWork,
    Parts,
    TimePart,
    flops_per_token,
    total,
)
from autotune.predict.shape import DecoderShape
from autotune.predict.step import (
    ADAM_BYTES,
    BUCKET_BYTES,
    HOOKED_PASSES,
    ISSUE_SECONDS,
    OPERATOR_SECONDS,
    SHORT_STATES_BYTES,
    StepTimes,
    in_buckets,
    stretch,
)
from autotune.predict.tiled_mlp import TiledMlpWork
from autotune.predict.trials import Trials
from autotune.spec.cluster import ClusterSpec
from autotune.spec.nvme import MOVED_BYTES

HOST_ADAM_SECONDS = 0.22e-9
"""A parameter of a node, DeepSpeed's CPU-Adam: 0.22 s for 10^9 (Ren et al., arXiv:2101.06840, table 4)."""
ZERO_3_OPERATORS = 20
"""A layer and pass: DeepSpeed's hooks before and after each of its modules. Judgement."""
HOOK_OPERATORS = 8
"""A layer and forward pass, that accelerate's hooks take as long as: 0.07 to 0.09 ms beside the layer's own 0.17 to
0.19, of Qwen3 with tensors too small to count (2026-11-25, accelerate 1.15, torch 2.13, one core of an AMD EPYC virtual
machine, three runs)."""


def predict_trials(
    shape: DecoderShape,
    trials: Trials,
    cluster: ClusterSpec,
    kernels: KernelProfile = TRANSFORMERS_KERNELS,
) -> StepTimes:
    """Step times of trials of one model.

    Args:
        shape: a dense model with equal layers.
        trials: N of them, legal ones.
        cluster: its GPUs, and how many share a node.
        kernels: of the library that runs the layers.

    Raises:
        UnknownHardwareError: the GPU's kernels or network are not known, or it lacks a precision.
    """
    count = len(trials.gpus)
    parts = {part: np.zeros(count) for part in TimePart}
    peak, issue = np.zeros(count), np.zeros(count)
    kinds = np.stack([trials.engine, trials.precision, trials.attention], axis=1)
    for engine, precision, attention in np.unique(kinds, axis=0).tolist():
        chosen = (kinds == (engine, precision, attention)).all(axis=1)
        profile = replace(kernels, score_bytes=EAGER_SCORE_BYTES) if attention == "eager" else kernels
        some = _Sharded(shape, trials[chosen], cluster, profile, engine, precision)
        for part, seconds in some.parts().items():
            parts[part][chosen] = seconds
        issue[chosen] = trials.accumulation[chosen] * some.issued()
        peak[chosen] = peak_flops(cluster.gpu, precision)
    sharing = trials.tensor * trials.sequence * trials.stages * trials.in_turn
    tokens = trials.real * trials.micro_batch * trials.length * trials.accumulation / sharing
    return StepTimes(parts, tokens, _flops_per_token(shape, trials), peak, issue)


def _flops_per_token(shape: DecoderShape, trials: Trials) -> Values:
    """As `autotune.spec.adapters.flops_per_token` counts them."""
    whole = flops_per_token(shape, trials.length)
    weights = flops_per_token(shape, np.zeros_like(trials.length)) / 6
    adapters = len(shape.layers) * layer_parameters(shape, trials.rank, trials.on_attention, trials.on_mlp)
    return np.where(trials.rank > 0, whole - 2 * weights + 6 * adapters, whole)


def _sum(*parts: Parts) -> Parts:
    return {part: np.asarray(sum(of.get(part, 0.0) for of in parts)) for part in parts[0]}


class _Sharded:
    """Trials with one engine, precision and attention."""

    def __init__(
        self,
        shape: DecoderShape,
        trials: Trials,
        cluster: ClusterSpec,
        kernels: KernelProfile,
        engine: str,
        precision: str,
    ) -> None:
        tokens = (trials.micro_batch * trials.length / trials.sequence).astype(float)
        tensor = trials.tensor.astype(float)
        self._shape, self._trials, self._kernels = shape, trials, kernels
        self._net, self._node = network(cluster.gpu), cluster.gpus_per_node
        self._disk = None if cluster.nvme is None else cluster.nvme.bandwidth_bytes_per_second
        self._gpu, self._deepspeed, self._value = cluster.gpu, engine == "deepspeed", 4 if precision == "fp32" else 2
        self._mixed = precision != "fp32"
        length = trials.length.astype(float)
        self._work = LayerWork(
            shape,
            cluster.gpu,
            kernels,
            precision,
            tokens,
            length,
            tensor,
            splits_norms=not self._deepspeed,
            frozen=trials.rank > 0,
        )
        casts = self._mixed and not self._deepspeed
        self._adapters = AdapterWork(
            self._work, trials.rank, trials.on_attention, trials.on_mlp, trials.quantized, casts
        )
        self._tiles = TiledMlpWork(self._work, self._adapters)
        self._replicas = trials.gpus // (trials.tensor * trials.stages * trials.in_turn)
        self._shards = self._replicas // trials.groups
        self._ranks = group(self._shards, trials.tensor, self._node)
        self._row_bytes = self._value * tokens * shape.hidden_size
        self._forward, self._backward = (
            _sum(self._work.layer(backward=backward), self._adapters.layer(backward=backward))
            for backward in (False, True)
        )
        exchanged = self._layer_collectives(tokens)
        self._forward[TimePart.TENSOR_PARALLEL] = exchanged + self._positions(tokens)
        self._backward[TimePart.TENSOR_PARALLEL] = exchanged
        self._layers = len(shape.layers) / trials.stages
        # Of a rank; the first and the last stage have an embedding or a head as well.
        heads = np.where(trials.stages > 1, 1, 2 - shape.tie_word_embeddings)
        layer, matrix = shape.layers[0].parameters, shape.embedding.parameters
        self._parameters = (self._layers * layer + heads * matrix) / tensor + shape.hidden_size
        if self._deepspeed and not shape.tie_word_embeddings:  # AutoTP's ranks have all of the embedding
            self._parameters = self._parameters + matrix * (1 - 1 / tensor)
        adapters = self._layers * layer_parameters(shape, trials.rank, trials.on_attention, trials.on_mlp) / tensor
        self._trained = np.where(trials.rank > 0, adapters, self._parameters)

    def parts(self) -> Parts:
        """Of the step."""
        trials, work, layers = self._trials, self._work, self._layers
        steps = trials.accumulation
        compute = {part: layers * (self._forward[part] + self._backward[part]) for part in self._forward}
        again = self._again()
        compute[TimePart.RECOMPUTATION] = layers * again
        head = work.head(backward=False)
        compute[TimePart.LOGITS] = (1 + trials.chunked) * head + work.head(backward=True) + work.embedding_gradient()
        compute[TimePart.TENSOR_PARALLEL] = compute[TimePart.TENSOR_PARALLEL] + self._ends()
        casts, sums = self._weight_bytes()
        compute[TimePart.ELEMENTWISE] = compute[TimePart.ELEMENTWISE] + work.memory(casts)
        compute[TimePart.ACCUMULATION] = work.memory(sums)
        compute[TimePart.PIPELINE_TRANSFER] = self._transfer()
        compute[TimePart.LAUNCH] = np.maximum(self.issued() - total(compute), 0)
        result = {part: steps * seconds for part, seconds in compute.items()}
        result[TimePart.BUBBLE] = (trials.stages - 1) * trials.idle * total(compute)
        forward = stretch(compute) * total(self._forward)
        backward = stretch(compute) * (total(self._backward) + again)
        result[TimePart.GRADIENT_REDUCTION] = self._reduction(backward)
        result[TimePart.PARAMETER_GATHER] = self._gather(forward, backward)
        offloaded = trials.offload != "none"
        shards = np.where(trials.zero_stage > 0, self._shards, 1)
        bytes_each = ADAM_BYTES - SHORT_STATES_BYTES * trials.short_states
        update = work.memory(bytes_each * self._trained / shards)
        result[TimePart.OPTIMIZER] = np.where(offloaded, 0.0, update)
        result[TimePart.OFFLOAD] = np.where(offloaded, self._offload(shards), 0.0)
        return result

    def _again(self) -> Values:
        """Seconds of a layer's backward pass in which its forward pass runs again, or its MLP does piece by piece."""
        forward, recomputed = self._forward, self._trials.recomputed
        kept = total(forward) - forward[TimePart.MATMUL] - forward[TimePart.ATTENTION]
        again = np.where(self._trials.keeps_products, kept, recomputed * total(forward))
        # What tensor-parallel ranks gather for an MLP, or sum after it.
        collective = self._net.all_reduce if self._deepspeed else self._net.all_gather
        tiled = self._tiles.seconds(1 + recomputed) + collective(self._tensor_group, self._row_bytes)
        return again + np.where(self._trials.tiled, tiled, 0.0)

    def _layer_collectives(self, tokens: Values) -> Values:
        """Seconds of one pass of a layer that is split over ranks; what computation hides of it is left out."""
        trials, net, shape = self._trials, self._net, self._shape
        self._tensor_group = group(trials.tensor, np.ones_like(trials.tensor), self._node)
        shared = self._sequence_group = group(trials.sequence, trials.tensor, self._node)
        key_heads = np.maximum(shape.num_key_value_heads // trials.tensor, 1)
        copies = trials.sequence // np.gcd(key_heads, trials.sequence)  # to all the ranks whose queries need them
        keys = shape.key_value_width * copies
        widths = (shape.query_width, keys, keys, shape.query_width)
        # Each rank sends all of its share but its own part of it, as in an all-gather of as many bytes.
        exchanged = sum(net.all_gather(shared, self._value * tokens * width / trials.tensor) for width in widths)
        if self._deepspeed:
            return np.asarray(2 * net.all_reduce(self._tensor_group, self._row_bytes) + exchanged)
        return np.asarray(4 * net.all_gather(self._tensor_group, self._row_bytes) + exchanged)

    def _positions(self, tokens: Values) -> Values:
        """Seconds in which a layer of DeepSpeed's Ulysses gathers the positions of all tokens, 8 bytes each."""
        gathered = self._net.all_gather(self._sequence_group, 8 * tokens * self._trials.sequence)
        return gathered if self._deepspeed else np.zeros_like(gathered)

    def _ends(self) -> Values:
        """Seconds of a micro-batch in which embedding and head communicate over tensor parallel ranks."""
        net, ranks = self._net, self._tensor_group
        if not self._deepspeed:
            return 4 * net.all_gather(ranks, self._row_bytes)
        summed = net.all_reduce(ranks, self._row_bytes)
        if self._shape.tie_word_embeddings:
            return 2 * summed
        return summed + net.all_gather(ranks, self._row_bytes / self._shape.hidden_size * self._shape.vocab_size)

    def _transfer(self) -> Values:
        """Seconds of a micro-batch's messages between stages."""
        trials = self._trials
        far = trials.tensor * self._replicas >= self._node
        messages = 2 * trials.stages_of_rank * self._net.send(self._row_bytes / trials.tensor, far=far)
        near = np.zeros_like(far)
        hops = 2 * (trials.in_turn - 1) * self._net.send(self._row_bytes, far=near)
        logits = self._net.send(self._row_bytes / self._shape.hidden_size * self._shape.vocab_size, far=near)
        return np.where(trials.stages > 1, messages, np.where(trials.in_turn > 1, hops + logits, 0.0))

    def _weight_bytes(self) -> tuple[Values, Values]:
        """Bytes of a micro-batch: weights cast for compute, gradients added to their sum.

        DeepSpeed's weights are in the compute dtype. DDP's are fp32 under autocast, which casts each weight and its
        gradient; FSDP2 casts shards.
        """
        held = 1.0 if self._deepspeed else np.where(self._trials.zero_stage > 0, self._shards, 1)
        casts = 0.0 if self._deepspeed or not self._mixed else 6 * self._trained / held
        ddp = not self._deepspeed and self._mixed
        sums = np.where((self._trials.zero_stage == 0) & ddp, 18, 3 * self._value) * self._trained
        return casts + np.zeros_like(sums), sums

    def issued(self) -> Values:
        """Seconds that the processor needs to issue one micro-batch."""
        hooks = 2 * ZERO_3_OPERATORS * OPERATOR_SECONDS * (self._trials.zero_stage == 3) * self._deepspeed
        trials = self._trials
        sharded = (4 * (trials.tensor > 1) + 4 * (trials.sequence > 1)) * OPERATOR_SECONDS
        passes = 1 + HOOKED_PASSES * np.maximum(trials.recomputed, trials.keeps_products)
        ahead, behind = (self._adapters.issue_seconds(backward=backward) for backward in (False, True))
        ahead = ahead + HOOK_OPERATORS * OPERATOR_SECONDS * (trials.in_turn > 1)
        layer = (ISSUE_SECONDS[0] + ahead + sharded) * passes + ISSUE_SECONDS[1] + behind + sharded + hooks
        zero_3 = ZERO_3_OPERATORS * ((trials.zero_stage == 3) & self._deepspeed)
        pieces = self._tiles.issue_seconds(1 + HOOKED_PASSES * trials.recomputed, zero_3.astype(float))
        layer = layer + np.where(trials.tiled, pieces, 0.0)
        return np.asarray(self._layers * layer)

    def _reduction(self, backward_layer: Values) -> Values:
        """Gradients summed over the ranks, beside layers of `backward_layer` seconds.

        DDP: fp32, in buckets, during the last backward pass. FSDP2: scattered layer by layer in the last one.
        DeepSpeed: stage 0 and 1 after the last one, 2 and 3 in each; hidden only with `overlap_comm`. In fp32 where
        ranks share sequences (its `seq_parallel_communication_data_type`).
        """
        trials, net = self._trials, self._net
        value = np.where((trials.sequence > 1) & self._deepspeed, 4, self._value)
        size = value * self._trained + np.zeros(len(trials.gpus))
        window = self._layers * backward_layer
        scatter = net.all_gather(self._ranks, size / self._layers)
        across = group(trials.groups, trials.tensor * self._shards, self._node)
        scatter = scatter + net.all_reduce(across, size / self._layers / self._shards)
        layer_by_layer = self._layers * np.maximum(scatter - backward_layer, 0) + scatter
        if not self._deepspeed:
            ddp = in_buckets(net, self._ranks, 4 * self._trained + 0 * size, BUCKET_BYTES)
            ddp = np.maximum(
                ddp - window, net.all_reduce(self._ranks, np.minimum(4 * self._trained + 0 * size, BUCKET_BYTES))
            )
            return np.where(trials.zero_stage == 0, ddp, layer_by_layer)
        once = np.where(trials.zero_stage == 0, net.all_reduce(self._ranks, size), net.all_gather(self._ranks, size))
        exposed = np.where(trials.overlaps & (trials.zero_stage > 0), layer_by_layer, once)
        return np.where(trials.zero_stage >= 2, trials.accumulation, 1) * exposed

    def _gather(self, forward_layer: Values, backward_layer: Values) -> Values:
        """Sharded parameters gathered: for each layer forward, and backward at stage 3; below, after the step.

        A second copy of them (hpZ) is made by the first forward pass of a step, and gathered in all later passes.
        """
        trials, net = self._trials, self._net
        size = self._value * self._parameters + np.zeros(len(trials.gpus))
        one = net.all_gather(self._ranks, size / self._layers)
        copy = group(
            np.where(trials.second_partition > 1, trials.second_partition, self._shards), trials.tensor, self._node
        )
        again = net.all_gather(copy, size / self._layers)
        first = self._layers * np.maximum(one - forward_layer, 0) + one
        later = self._layers * np.maximum(again - forward_layer, 0) + again
        backward = self._layers * np.maximum(again - backward_layer, 0)
        passes = first + (trials.accumulation - 1) * later
        passes = passes + np.where(trials.zero_stage == 3, trials.accumulation * backward, 0.0)
        after = net.all_gather(self._ranks, self._value * self._trained + 0 * size)
        in_layers = (trials.zero_stage == 3) | ((trials.zero_stage == 2) & (not self._deepspeed))
        return np.where(trials.zero_stage == 0, 0.0, np.where(in_layers, passes, after))

    def _offload(self, shards: Values | Counts) -> Values:
        """Gradients to the host, Adam there, parameters back; offloaded parameters once more for each pass."""
        trials, link = self._trials, host_link(self._gpu)
        share, held = self._trained / shards, self._parameters / shards
        on_node = np.minimum(trials.gpus, self._node)
        adam = HOST_ADAM_SECONDS * share * on_node
        on_disk = trials.offload == "optimizer_nvme+parameters_nvme"
        # From a disk nothing is kept from recomputation for the backward pass after it, nor read ahead.
        passes = trials.accumulation * (2 + trials.recomputed * on_disk)
        if self._disk is not None:
            moved = MOVED_BYTES * share * np.char.startswith(trials.offload, "optimizer_nvme")
            moved = moved + self._value * (share + passes * held) * on_disk
            adam = adam + moved * on_node / self._disk
        down = np.where(trials.zero_stage >= 2, trials.accumulation, 1) * self._value * share / link
        passes = passes * (np.char.find(trials.offload, "+parameters") > 0)
        # FSDP2 copies fp32 shards up for each gathering, casts them there, and reduces only the last gradients.
        if not self._deepspeed:
            gathered = np.where(trials.zero_stage == 3, 2, 1) * trials.accumulation
            frozen = self._value * gathered * (held - share)  # in the compute dtype already
            return np.asarray(adam + ((self._value + 4 * gathered) * share + frozen) / link)
        return np.asarray(adam + down + self._value * (share + passes * held) / link)
