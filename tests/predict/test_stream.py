"""A made-up step whose live memory is also counted change by change: the formula must find the same peak."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.predict.segments import (
    CHECKED_BATCH,
    CHECKED_LENGTH,
    TRACED_BATCH,
    TRACED_LAYERS,
    TRACED_LENGTH,
    Change,
    Key,
    StructureError,
    Trace,
)
from autotune.predict.structure import Structure
from autotune.spec.prediction import Part

SAVED, WORK = Part.ACTIVATIONS, Part.LOGITS


@dataclasses.dataclass(frozen=True)
class Step:
    """What each place allocates, as one tensor each: bytes of (a constant, a position, a token, a pair)."""

    saved: tuple[int, int, int, int] = (512, 3, 40, 0)
    forward_work: tuple[int, int, int, int] = (0, 0, 70, 0)
    backward_work: tuple[int, int, int, int] = (4096, 0, 90, 2)
    logits: tuple[int, int, int, int] = (0, 0, 1000, 0)
    gradient: int = 5000
    state: int = 10_000

    def trace(self, layers: int, batch: int, length: int) -> Trace:
        segments: dict[Key, tuple[Change, ...]] = {}

        def tensors(name: str, terms: tuple[int, int, int, int], part: Part, sign: int = 1) -> list[Change]:
            units = (1, length, batch * length, batch * length**2)
            return [Change(name, sign * t * u, part) for t, u in zip(terms, units, strict=True)]

        def work(terms: tuple[int, int, int, int]) -> list[Change]:
            return [*tensors("work", terms, WORK), *tensors("work", terms, WORK, -1)]

        embedded = (0, 0, 8, 0)
        for step in range(2):
            segments[step, "before", 0] = tuple(tensors("embed", embedded, SAVED))
            for layer in range(layers):
                saved = tensors("save", self.saved, SAVED)
                segments[step, "forward", layer] = (*work(self.forward_work), *saved)
            segments[step, "between", 0] = tuple(work(self.logits))
            for layer in reversed(range(layers)):
                segments[step, "backward", layer] = (
                    *work(self.backward_work),
                    Change("gradient", self.gradient, Part.GRADIENTS),
                    *tensors("save", self.saved, SAVED, -1),
                )
            states = [Change("state", self.state, Part.OPTIMIZER_STATES)] * layers if step == 0 else []
            freed = [Change("zero", -self.gradient, Part.GRADIENTS)] * layers
            segments[step, "after", 0] = (*states, *freed, *tensors("embed", embedded, SAVED, -1))
        return Trace(layers, batch, length, {Part.PARAMETERS: 1000 + 500 * layers}, segments)


def structure(step: Step, single: bool = False) -> Structure:
    return Structure.fit(
        step.trace(TRACED_LAYERS, 1 if single else TRACED_BATCH, TRACED_LENGTH),
        step.trace(TRACED_LAYERS + 1, 1 if single else CHECKED_BATCH, CHECKED_LENGTH),
    )


def live(trace: Trace) -> Iterator[int]:
    now = sum(trace.standing.values())
    for changes in trace.segments.values():
        for change in changes:
            now += change.bytes
            yield now


# Factors of powers of two, as dimensions are: a trace must not take a constant for something per token.
power = st.integers(0, 20).map(lambda exponent: 2**exponent)
terms = st.tuples(power, power, power, st.sampled_from([0, 1, 2, 4]))


@settings(deadline=None, max_examples=60)
@given(
    step=st.builds(
        Step, saved=terms, forward_work=terms, backward_work=terms, logits=terms,
        gradient=power, state=power,
    ),
    layers=st.integers(TRACED_LAYERS, 40),
    batch=st.integers(1, 9),
    length=st.integers(1, 5000),
)  # fmt: skip
def test_the_peak_is_that_of_the_counted_step(step: Step, layers: int, batch: int, length: int) -> None:
    stream = structure(step, single=batch == 1).stream(layers)
    counted = max(live(step.trace(layers, batch, length)))
    predicted = stream.peak_bytes(np.array([batch]), np.array([length]), "cpu")[0]
    assert predicted == pytest.approx(counted, rel=1e-9, abs=2)
    assert sum(stream.breakdown(batch, length, "cpu").values()) == pytest.approx(counted, rel=1e-9, abs=10)


def test_depth_costs_no_time_and_no_memory() -> None:
    found = structure(Step())
    assert found.stream(1000).live.shape == found.stream(8).live.shape


def test_the_breakdown_names_what_lives_at_the_peak() -> None:
    parts = structure(Step(backward_work=(4096, 0, 90, 0))).stream(8).breakdown(2, 1000, "cpu")
    assert parts[Part.OPTIMIZER_STATES] == 8 * 10_000
    assert parts[Part.PARAMETERS] == 1000 + 8 * 500
    assert parts[Part.LOGITS] == 1000 * 2000
    assert set(parts) <= {Part.OPTIMIZER_STATES, Part.PARAMETERS, Part.LOGITS, Part.ACTIVATIONS, Part.GRADIENTS}


def test_a_bend_is_found_out() -> None:
    class Bent(Step):
        def trace(self, layers: int, batch: int, length: int) -> Trace:
            found = super().trace(layers, batch, length)
            key: Key = (0, "forward", 1)
            more = Change("save", 40 * max(0, length - 300), SAVED)
            return dataclasses.replace(found, segments={**found.segments, key: (*found.segments[key], more)})

    with pytest.raises(StructureError, match="micro-step 0, forward of layer 1 is no line"):
        structure(Bent())


def test_layers_that_differ_are_found_out() -> None:
    class Alternating(Step):
        def trace(self, layers: int, batch: int, length: int) -> Trace:
            found = super().trace(layers, batch, length)
            odd = {
                key: (*changes, Change("odd", 10_000, SAVED)) if key[1] == "forward" and key[2] % 2 else changes
                for key, changes in found.segments.items()
            }
            return dataclasses.replace(found, segments=odd)

    with pytest.raises(StructureError, match="layer 2 is not like"):
        structure(Alternating())


def test_too_shallow_a_model_is_refused() -> None:
    with pytest.raises(StructureError, match="2 layers"):
        structure(Step(), single=True).stream(2)
