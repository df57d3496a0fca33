import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.errors import UnknownHardwareError
from autotune.predict.cases import answer
from autotune.predict.kernels import matmul_seconds, memory_seconds
from autotune.predict.layout_times import STEP_PROFILES, Layouts, predict_layouts
from autotune.predict.layouts import Layout
from autotune.predict.network import group, network
from autotune.predict.roofline import TimePart, flops_per_token
from autotune.predict.shape import DecoderShape, read_shape
from autotune.predict.step import StepTimes, TimePrediction
from autotune.predict.throughput import predict_trials
from autotune.predict.trials import Trials
from autotune.spec.cluster import GPUS, ClusterSpec, NvmeSpec, find_gpu
from autotune.spec.config import Loss, PipelineSchedule, TrialConfig
from autotune.spec.model import ModelSpec
from autotune.spec.workload import Workload

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
}
SHAPE = read_shape("llama", LLAMA)
H100 = find_gpu("H100-80GB")
NODE = ClusterSpec(nodes=1, gpus_per_node=8, gpu=H100)
CLUSTER = ClusterSpec(nodes=8, gpus_per_node=8, gpu=H100)
PLAIN = Layout(
    tensor_parallel_size=1,
    pipeline_parallel_size=1,
    data_parallel_size=8,
    zero_stage=0,
    micro_batch_size=2,
    gradient_accumulation_steps=8,
    sequence_length=4096,
    gpus_per_node=8,
)
TRIAL = TrialConfig(engine="pytorch", gpus=8, micro_batch_size=2, sequence_length=4096)
WORK = Workload(global_batch_size=64)

_GATHER = TimePart.PARAMETER_GATHER

sizes = st.sampled_from([1, 2, 4, 8])


def times(*layouts: Layout, profile: str = "nanotron", shape: DecoderShape = SHAPE) -> StepTimes:
    step = STEP_PROFILES[profile]
    columns = Layouts.of(layouts)
    return predict_layouts(shape, columns, step, CLUSTER, by_cost=profile != "megatron")


def of(layout: Layout, profile: str = "nanotron") -> TimePrediction:
    return times(layout, profile=profile).at(0)


def trial(config: TrialConfig, cluster: ClusterSpec = NODE) -> TimePrediction:
    return predict_trials(SHAPE, Trials.of([config], WORK, SHAPE), cluster).at(0)


layouts = st.builds(
    replace,
    st.just(PLAIN),
    tensor_parallel_size=sizes,
    pipeline_parallel_size=sizes,
    data_parallel_size=st.sampled_from([1, 2, 8, 16]),
    zero_stage=st.sampled_from([0, 1]),
    micro_batch_size=sizes,
    gradient_accumulation_steps=st.sampled_from([1, 4, 32]),
    activation_checkpointing=st.sampled_from(["none", "full"]),
)
configs = st.builds(
    TrialConfig,
    engine=st.just("deepspeed"),
    gpus=sizes,
    micro_batch_size=sizes,
    sequence_length=st.sampled_from([512, 4096]),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    zero_stage=st.integers(0, 3),
    offload=st.sampled_from(["none", "optimizer"]),
    activation_checkpointing=st.sampled_from(["none", "full"]),
    attention=st.sampled_from(["sdpa", "eager"]),
)


class TestAnyLayout:
    @settings(deadline=None)
    @given(layout=layouts, profile=st.sampled_from(sorted(STEP_PROFILES)))
    def test_is_slower_than_the_peak_of_its_gpus(self, layout: Layout, profile: str) -> None:
        found = of(layout, profile)
        assert 0 < found.model_flops_utilization < 1
        assert found.step_time_seconds == pytest.approx(sum(found.breakdown.values()))
        assert min(found.breakdown.values()) >= 0

    @settings(deadline=None)
    @given(layout=layouts, profile=st.sampled_from(sorted(STEP_PROFILES)))
    def test_takes_longer_with_more_to_do(self, layout: Layout, profile: str) -> None:
        more = (
            replace(layout, micro_batch_size=2 * layout.micro_batch_size),
            replace(layout, gradient_accumulation_steps=2 * layout.gradient_accumulation_steps),
            replace(layout, activation_checkpointing="full"),
        )
        now, *later = (of(one, profile).step_time_seconds for one in (layout, *more))
        # A longer backward pass hides more of the reduction: where the processor is late anyway, by a trifle more.
        assert all(seconds >= now * 0.99 for seconds in later)

    @settings(deadline=None)
    @given(several=st.lists(layouts, min_size=1, max_size=6))
    def test_is_the_same_alone_and_in_columns(self, several: list[Layout]) -> None:
        together = times(*several)
        for index, layout in enumerate(several):
            assert together.at(index).step_time_seconds == pytest.approx(of(layout).step_time_seconds)


class TestLayouts:
    def test_one_stage_has_no_bubble_and_sends_nothing(self) -> None:
        parts = of(PLAIN).breakdown
        assert parts[TimePart.BUBBLE] == parts[TimePart.PIPELINE_TRANSFER] == 0

    def test_the_bubble_is_the_other_stages_once(self) -> None:
        shape = read_shape("llama", LLAMA | {"vocab_size": 32})  # equal stages, but for the head
        four = times(
            replace(PLAIN, pipeline_parallel_size=4, gradient_accumulation_steps=6), profile="megatron", shape=shape
        ).at(0)
        steady = sum(
            seconds
            for part, seconds in four.breakdown.items()
            if part not in (TimePart.BUBBLE, TimePart.OPTIMIZER, TimePart.GRADIENT_REDUCTION, TimePart.PARAMETER_GATHER)
        )
        assert four.breakdown[TimePart.BUBBLE] == pytest.approx(steady * 3 / 6, rel=0.05)

    def test_one_rank_communicates_nothing(self) -> None:
        parts = of(replace(PLAIN, data_parallel_size=1)).breakdown
        assert parts[TimePart.TENSOR_PARALLEL] == parts[TimePart.GRADIENT_REDUCTION] == 0
        assert of(replace(PLAIN, data_parallel_size=1, zero_stage=1)).breakdown[TimePart.PARAMETER_GATHER] == 0

    def test_tensor_parallelism_costs_more_across_nodes_than_its_share_of_work(self) -> None:
        inside, across = (
            of(replace(PLAIN, tensor_parallel_size=size, data_parallel_size=1)).breakdown[TimePart.TENSOR_PARALLEL]
            for size in (8, 16)
        )
        assert across > inside

    def test_norms_are_split_with_sequence_parallelism_alone(self) -> None:
        """Of a model whose MLP and heads are small beside h, another rank halves the time or saves little."""
        shape = read_shape("llama", LLAMA | {"intermediate_size": 64, "num_attention_heads": 8, "head_dim": 8})
        layouts = [
            replace(PLAIN, tensor_parallel_size=size, data_parallel_size=8 // size, micro_batch_size=16)
            for size in (1, 2)
        ]
        for profile, least, most in (("nanotron", 0.5, 0.6), ("megatron", 0.9, 1.0)):
            one, two = (
                times(layout, profile=profile, shape=shape).at(0).breakdown[TimePart.ELEMENTWISE] for layout in layouts
            )
            assert least < two / one < most

    def test_zero_1_reduces_after_the_backward_pass_and_updates_a_share(self) -> None:
        zero_0, zero_1 = (of(replace(PLAIN, zero_stage=stage)).breakdown for stage in (0, 1))
        assert zero_1[TimePart.GRADIENT_REDUCTION] > zero_0[TimePart.GRADIENT_REDUCTION]
        assert zero_1[TimePart.OPTIMIZER] == pytest.approx(zero_0[TimePart.OPTIMIZER] / 8)

    def test_small_work_waits_for_the_processor_and_for_checked_collectives(self) -> None:
        small = replace(PLAIN, tensor_parallel_size=8, data_parallel_size=1, micro_batch_size=1, sequence_length=128)
        assert of(PLAIN).breakdown[TimePart.LAUNCH] == 0
        waits = of(small).breakdown[TimePart.LAUNCH]
        assert waits > 0
        assert of(small, "nanotron-checked").breakdown[TimePart.LAUNCH] > 2 * waits

    def test_throughput_and_utilization_follow_from_the_step(self) -> None:
        found = of(replace(PLAIN, tensor_parallel_size=2, pipeline_parallel_size=2))
        tokens = 2 * 4096 * 8 / 4
        assert found.tokens_per_second_per_gpu == pytest.approx(tokens / found.step_time_seconds)
        flops = ModelSpec(name="llama", config=LLAMA).flops_per_token(4096)
        assert flops_per_token(SHAPE, np.array([4096]))[0] == pytest.approx(flops)
        assert found.model_flops_utilization == pytest.approx(found.tokens_per_second_per_gpu * flops / 989.4e12)


class TestTrials:
    @settings(deadline=None)
    @given(config=configs)
    def test_any_is_slower_than_the_peak(self, config: TrialConfig) -> None:
        found = trial(config)
        assert 0 < found.model_flops_utilization < 1
        assert found.step_time_seconds == pytest.approx(sum(found.breakdown.values()))
        assert min(found.breakdown.values()) >= 0

    @settings(deadline=None)
    @given(several=st.lists(configs, min_size=1, max_size=6))
    def test_any_is_the_same_alone_and_in_columns(self, several: list[TrialConfig]) -> None:
        together = predict_trials(SHAPE, Trials.of(several, WORK, SHAPE), NODE)
        for index, config in enumerate(several):
            assert together.at(index).step_time_seconds == pytest.approx(trial(config).step_time_seconds)

    def test_each_saving_of_memory_costs_time(self) -> None:
        plain = replace(TRIAL, engine="deepspeed", zero_stage=3)
        now = trial(plain).step_time_seconds
        for dearer in (
            replace(plain, activation_checkpointing="full"),
            replace(plain, offload="optimizer"),
            replace(plain, offload="optimizer+parameters"),
            replace(plain, attention="eager"),
            replace(plain, precision="fp32"),
        ):
            assert trial(dearer).step_time_seconds > now, dearer

    def test_a_disk_adds_what_it_reads_and_writes(self) -> None:
        config = replace(TRIAL, engine="deepspeed", zero_stage=3, offload="optimizer_nvme")
        seconds = {
            speed: trial(config, replace(NODE, nvme=NvmeSpec(path="/nvme", bandwidth_bytes_per_second=speed)))
            for speed in (1e9, 1e10)
        }
        memory = trial(replace(config, offload="optimizer")).step_time_seconds
        of_the_node = 32 * SHAPE.num_parameters * min(config.gpus, NODE.gpus_per_node) / config.gpus
        for speed, found in seconds.items():
            assert found.step_time_seconds - memory == pytest.approx(of_the_node / speed)

    def test_parameters_on_a_disk_are_read_for_each_pass(self) -> None:
        disk = replace(NODE, nvme=NvmeSpec(path="/nvme", bandwidth_bytes_per_second=1e9))
        plain = replace(TRIAL, engine="deepspeed", zero_stage=3, offload="optimizer_nvme+parameters")
        on_disk = replace(plain, offload="optimizer_nvme+parameters_nvme")
        found = trial(on_disk, disk).step_time_seconds - trial(plain, disk).step_time_seconds
        once = 2 * SHAPE.num_parameters * min(plain.gpus, NODE.gpus_per_node) / plain.gpus / 1e9
        steps = WORK.gradient_accumulation_steps(plain)
        assert found == pytest.approx(once * (1 + 2 * steps))
        again = replace(on_disk, activation_checkpointing="full")
        in_memory = replace(plain, activation_checkpointing="full")
        found = trial(again, disk).step_time_seconds - trial(in_memory, disk).step_time_seconds
        assert found > once * (1 + 3 * steps)  # and over PCIe once more

    def test_selective_checkpointing_recomputes_its_layers(self) -> None:
        full = trial(replace(TRIAL, activation_checkpointing="full")).breakdown
        third = trial(replace(TRIAL, activation_checkpointing="selective", selective_every=3)).breakdown
        assert third[TimePart.RECOMPUTATION] == pytest.approx(full[TimePart.RECOMPUTATION] * 6 / 16)

    def test_zero_3_gathers_between_nodes_what_stage_0_does_not(self) -> None:
        far = replace(TRIAL, gpus=64, micro_batch_size=1, sequence_length=512)
        zero_0, zero_3 = (trial(replace(far, zero_stage=stage), CLUSTER).breakdown for stage in (0, 3))
        assert zero_0[TimePart.PARAMETER_GATHER] == 0 < zero_3[TimePart.PARAMETER_GATHER]

    def test_deepspeed_hides_the_reduction_where_it_is_told_to(self) -> None:
        key = "zero_optimization.overlap_comm"
        shown, hidden = (
            trial(replace(TRIAL, engine="deepspeed", zero_stage=2, deepspeed=((key, value),))).breakdown
            for value in (False, True)
        )
        assert hidden[TimePart.GRADIENT_REDUCTION] < shown[TimePart.GRADIENT_REDUCTION]

    def test_a_second_partition_gathers_inside_a_node_but_for_the_first_pass(self) -> None:
        far = replace(TRIAL, engine="deepspeed", gpus=64, micro_batch_size=1, sequence_length=256, zero_stage=3)
        near = replace(far, deepspeed=(("zero_optimization.zero_hpz_partition_size", 8),))

        def gathering(config: TrialConfig, accumulation: int) -> float:
            work = replace(WORK, global_batch_size=64 * accumulation)
            return float(predict_trials(SHAPE, Trials.of([config], work, SHAPE), CLUSTER).parts[_GATHER][0])

        # Passes after the first; backward ones are hidden, with and without.
        more, more_near = (gathering(config, 4) - gathering(config, 1) for config in (far, near))
        assert gathering(near, 1) == pytest.approx(gathering(far, 1))
        assert 0 < more_near < more / 3

    def test_one_gpu_communicates_nothing(self) -> None:
        parts = trial(replace(TRIAL, gpus=1)).breakdown
        assert parts[TimePart.GRADIENT_REDUCTION] == parts[TimePart.PARAMETER_GATHER] == 0


class TestSplitTrials:
    ALONE = TrialConfig(engine="pytorch", gpus=8, micro_batch_size=1, sequence_length=4096, zero_stage=2)

    def test_tensor_parallel_ranks_share_the_work_and_communicate(self) -> None:
        whole, split = (trial(replace(self.ALONE, tensor_parallel_size=size)).breakdown for size in (1, 4))
        assert whole[TimePart.TENSOR_PARALLEL] == 0 < split[TimePart.TENSOR_PARALLEL]
        # A quarter of the replicas run four times as many micro-batches of a quarter of the work each.
        assert split[TimePart.ATTENTION] == pytest.approx(whole[TimePart.ATTENTION], rel=0.05)

    def test_auto_tensor_parallel_ranks_do_all_norms_and_communicate_as_much(self) -> None:
        split = replace(self.ALONE, engine="deepspeed", tensor_parallel_size=4)
        ours, theirs = (trial(replace(split, engine=engine)).breakdown for engine in ("pytorch", "deepspeed"))
        assert theirs[TimePart.ELEMENTWISE] > 1.2 * ours[TimePart.ELEMENTWISE]
        # A sum moves what a gather and a scatter do.
        assert theirs[TimePart.TENSOR_PARALLEL] == pytest.approx(ours[TimePart.TENSOR_PARALLEL], rel=0.1)
        assert theirs[TimePart.MATMUL] == pytest.approx(ours[TimePart.MATMUL])

    def test_sequence_parallel_ranks_share_the_sequence_and_not_the_parameters(self) -> None:
        whole, split = (trial(replace(self.ALONE, sequence_parallel_size=size)).breakdown for size in (1, 4))
        assert split[TimePart.OPTIMIZER] == pytest.approx(whole[TimePart.OPTIMIZER])
        assert split[TimePart.TENSOR_PARALLEL] > 0

    def test_sequences_shared_by_deepspeed_exchange_as_much_gather_positions_and_reduce_in_fp32(self) -> None:
        split = replace(self.ALONE, zero_stage=3, sequence_parallel_size=4)
        ours, theirs = (trial(replace(split, engine=engine)).breakdown for engine in ("pytorch", "deepspeed"))
        assert 1 < theirs[TimePart.TENSOR_PARALLEL] / ours[TimePart.TENSOR_PARALLEL] < 1.5
        whole = trial(replace(split, engine="deepspeed", sequence_parallel_size=1)).breakdown
        # A quarter of the replicas run four times as many micro-batches, each reduced in twice as many bytes.
        ratio = theirs[TimePart.GRADIENT_REDUCTION] / whole[TimePart.GRADIENT_REDUCTION]
        assert ratio > 4

    def test_key_heads_that_are_fewer_than_the_ranks_are_sent_to_several(self) -> None:
        few = replace(SHAPE, num_key_value_heads=2)
        shared = replace(self.ALONE, gpus=8, sequence_parallel_size=8)
        found = [predict_trials(shape, Trials.of([shared], WORK, shape), CLUSTER).parts for shape in (SHAPE, few)]
        assert SHAPE.num_key_value_heads % 8 == 0
        assert found[1][TimePart.TENSOR_PARALLEL][0] > 1.1 * found[0][TimePart.TENSOR_PARALLEL][0]

    def test_a_schedule_idles_less_with_more_stages_a_rank(self) -> None:
        schedules: tuple[PipelineSchedule, ...] = ("1f1b", "interleaved_1f1b", "zero_bubble")
        staged = replace(self.ALONE, pipeline_parallel_size=4)
        found = [trial(replace(staged, pipeline_schedule=name)).breakdown for name in schedules]
        idle = [parts[TimePart.BUBBLE] for parts in found]
        assert idle[0] > idle[1] > idle[2] > 0
        assert found[1][TimePart.PIPELINE_TRANSFER] == pytest.approx(2 * found[0][TimePart.PIPELINE_TRANSFER])
        assert trial(self.ALONE).breakdown[TimePart.BUBBLE] == 0

    def test_a_chunked_loss_computes_the_logits_twice(self) -> None:
        losses: tuple[Loss, ...] = ("full_logits", "chunked")
        whole, chunked = (trial(replace(self.ALONE, loss=loss)).breakdown for loss in losses)
        assert 1.1 * whole[TimePart.LOGITS] < chunked[TimePart.LOGITS] < 1.5 * whole[TimePart.LOGITS]


class TestHardware:
    def test_a_device_without_figures_is_an_error(self) -> None:
        cluster = ClusterSpec(nodes=1, gpus_per_node=8, gpu=find_gpu("cpu"), memory_bytes=2**30)
        with pytest.raises(UnknownHardwareError, match="cpu"):
            trial(TRIAL, cluster)
        with pytest.raises(UnknownHardwareError, match="unheard"):
            trial(TRIAL, replace(NODE, gpu=replace(H100, name="unheard of")))

    def test_a_precision_that_the_gpu_lacks_is_an_error(self) -> None:
        cluster = replace(NODE, gpu=replace(H100, peak_flops_per_second={"fp32": 1e12}))
        with pytest.raises(UnknownHardwareError, match="bf16"):
            trial(TRIAL, cluster)

    @pytest.mark.parametrize("name", sorted(set(GPUS) - {"cpu"}))
    def test_every_gpu_of_the_table_has_times(self, name: str) -> None:
        offloaded = replace(TRIAL, engine="deepspeed", zero_stage=2, offload="optimizer")
        assert trial(offloaded, replace(NODE, gpu=find_gpu(name), memory_bytes=0)).step_time_seconds > 0

    @given(rows=st.integers(1, 10**5), columns=st.integers(1, 10**5), inner=st.integers(1, 10**5))
    def test_a_product_takes_what_arithmetic_and_memory_take(self, rows: int, columns: int, inner: int) -> None:
        seconds = float(matmul_seconds(H100, "bf16", float(rows), float(columns), float(inner)))
        assert seconds > 2 * rows * columns * inner / 989.4e12
        assert seconds > float(memory_seconds(H100, 2.0 * (rows * columns + rows * inner + inner * columns)))
        assert float(matmul_seconds(H100, "bf16", 2.0 * rows, float(columns), float(inner))) >= seconds

    @given(size=st.sampled_from([2, 4, 8, 16, 64, 512]), stride=sizes, count=st.floats(1, 1e11))
    def test_collectives_take_what_the_slowest_link_takes(self, size: int, stride: int, count: float) -> None:
        ranks, net = group(np.array([size]), np.array([stride]), 8), network(H100)
        moved = np.array([count])
        gather, both = float(net.all_gather(ranks, moved)[0]), float(net.all_reduce(ranks, moved)[0])
        assert gather > (size - 1) / size * count / 450e9
        assert both > 2 * (size - 1) / size * count / 450e9
        assert net.all_gather(ranks, 2 * moved)[0] > gather

    def test_a_group_fills_one_node_after_the_other(self) -> None:
        ranks = group(np.array([8, 8, 8, 16, 4]), np.array([1, 2, 8, 1, 16]), 8)
        assert ranks.nodes.tolist() == [1, 2, 8, 2, 4]


class TestCases:
    def test_a_layout_is_answered_with_its_time(self) -> None:
        case = {
            "id": 1,
            "model": LLAMA,
            "cluster": {"gpu": "H100-80GB", "nodes": 1, "gpus_per_node": 8},
            "implementation": "nanotron",
            "workload": {"sequence_length": 4096},
            "config": {"micro_batch_size": 2, "gradient_accumulation_steps": 8},
        }
        found, wanted = answer(case), of(PLAIN)
        assert found["step_time_seconds"] == pytest.approx(wanted.step_time_seconds, rel=1e-4)
        assert found["tokens_per_second_per_gpu"] == pytest.approx(wanted.tokens_per_second_per_gpu, rel=1e-4)
        assert found["model_flops_utilization"] == pytest.approx(wanted.model_flops_utilization, rel=1e-4)
        assert sum(found["step_time_breakdown"].values()) == pytest.approx(found["step_time_seconds"], rel=1e-4)
        checked = answer(case | {"implementation": "nanotron-checked"})
        assert checked["peak_memory_bytes"] == found["peak_memory_bytes"]


def test_a_quarter_of_a_million_take_seconds() -> None:
    count = 250_000
    chance = np.random.default_rng(0)

    def pick(*values: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return chance.choice(np.array(values, np.int64), count)

    many = Layouts(
        pick(1, 2, 4, 8), pick(1, 2, 4, 8), pick(1, 2, 8), pick(0, 1), pick(1, 2, 4), pick(8, 64), pick(4096),
        pick(0, 1).astype(bool),
    )  # fmt: skip
    start = time.perf_counter()
    found = predict_layouts(SHAPE, many, STEP_PROFILES["nanotron"], CLUSTER, by_cost=True)
    assert np.isfinite(found.step_seconds).all()
    assert time.perf_counter() - start < 10
