"""What one step of each axis away from the winner does: from trials where there are any, else from the posterior."""

from dataclasses import replace

from autotune.predict.levers import moves
from autotune.predict.plan import Plan
from autotune.predict.roofline import TimePart
from autotune.results import Best
from autotune.search.earlier import Earlier
from autotune.search.plan_sampler import PlanSampler
from autotune.search.step_parts import NETWORK
from autotune.spec.config import Scalar, TrialConfig
from autotune.spec.outcome import Measurement, Outcome
from autotune.spec.sensitivity import Basis, Constraint, Sensitivity, Step
from autotune.study import Study
from autotune.units import format_bytes

_CONSTRAINTS = dict.fromkeys(NETWORK, Constraint.COMMUNICATION) | {
    TimePart.BUBBLE: Constraint.BUBBLE,
    TimePart.LAUNCH: Constraint.PROCESSOR,
    TimePart.OFFLOAD: Constraint.HOST_LINK,
}
"""Of the parts of a step; the others are compute."""


def find_sensitivity(study: Study, plan: Plan, earlier: Earlier | None = None) -> Sensitivity | None:
    """Of the study's best trial; None where there is none."""
    best = study.best()
    return None if best is None else _Neighbourhood(study, plan, best, earlier).sensitivity()


class _Neighbourhood:
    """The winner and the configs one step away."""

    def __init__(self, study: Study, plan: Plan, best: Best, earlier: Earlier | None) -> None:
        self._study, self._plan, self._best = study, plan, best
        self._outcomes: dict[TrialConfig, tuple[int, Outcome]] = {c: (n, o) for n, c, o in study.results}
        screened = self._outcomes[best.config][1]
        # Steps were screened, so that the winner's screening is what they compare with.
        assert isinstance(screened, Measurement)
        self._speed = screened.tokens_per_second_per_gpu
        self._moves = list(moves(plan.space, best.config))
        self._expected = PlanSampler(study, plan, 0, earlier).expected(config for _, _, config, _ in self._moves)

    def sensitivity(self) -> Sensitivity:
        steps = tuple(self._step(*move) for move in self._moves)
        constraint, because = self._constraint(steps)
        return Sensitivity(
            trial=self._best.trial,
            trials=self._study.counts.finished,
            steps=steps,
            device_used_bytes=self._best.measurement.peak_device_used_bytes,
            usable_bytes=int(self._plan.space.usable_bytes),
            constraint=constraint,
            because=because,
        )

    def _step(self, axis: str, value: Scalar, config: TrialConfig, refusal: str | None) -> Step:
        if refusal is not None:
            return Step(axis=axis, value=value, basis=Basis.ILLEGAL, note=refusal)
        step = self._unmeasured(axis, value, config)
        if config not in self._outcomes:
            return step
        trial, outcome = self._outcomes[config]
        if isinstance(outcome, Measurement):
            fits = self._study.eligible(outcome)
            return replace(
                step,
                basis=Basis.MEASURED,
                ratio=outcome.tokens_per_second_per_gpu / self._speed,
                low=None,
                high=None,
                device_used_bytes=outcome.peak_device_used_bytes,
                fit_probability=float(fits),
                trial=trial,
                note=None if fits else "too little headroom",
            )
        ending = outcome.kind.value.replace("_", " ")
        if outcome.most_tokens_per_second_per_gpu is not None:
            most = outcome.most_tokens_per_second_per_gpu / self._speed
            return replace(step, basis=Basis.MEASURED, ratio=most, low=None, high=None, trial=trial, note=ending)
        probability = 0.0 if outcome.kind.is_memory else step.fit_probability
        return replace(step, basis=Basis.MEASURED, fit_probability=probability, trial=trial, note=ending)

    def _unmeasured(self, axis: str, value: Scalar, config: TrialConfig) -> Step:
        found = self._expected.get(config)
        if found is None:
            return self._predicted(axis, value, config)
        timed = self._plan.times is not None or len(self._outcomes) > 1
        return Step(
            axis=axis,
            value=value,
            basis=Basis.EXPECTED,
            ratio=found.throughput / self._speed if timed else None,
            low=found.throughput_low / self._speed if timed else None,
            high=found.throughput_high / self._speed if timed else None,
            device_used_bytes=round(found.peak_bytes),
            fit_probability=found.fit_probability,
        )

    def _predicted(self, axis: str, value: Scalar, config: TrialConfig) -> Step:
        """What the plan says of a config that is not worth a launch."""
        prediction, winner = self._plan.of(config), self._plan.of(self._best.config)
        if prediction is None:
            return Step(axis=axis, value=value, basis=Basis.PREDICTED, note="not predicted")
        speeds = [None if one is None else one.tokens_per_second_per_gpu for one in (prediction, winner)]
        mine, its = speeds
        return Step(
            axis=axis,
            value=value,
            basis=Basis.PREDICTED,
            ratio=None if mine is None or its is None else mine / its,
            device_used_bytes=prediction.device_used_bytes,
            fit_probability=0.0,
        )

    def _constraint(self, steps: tuple[Step, ...]) -> tuple[Constraint, str]:
        """Memory, if a step that it forbids would be faster; else what most of the winner's step is, by prediction."""
        used, usable = self._best.measurement.peak_device_used_bytes, self._plan.space.usable_bytes
        memory = f"the winner uses {format_bytes(used)} of the {format_bytes(usable)} that are usable"
        forbidden = [step for step in steps if step.fit_probability is not None and not step.fits]
        faster = [step for step in forbidden if step.ratio is not None and step.ratio > 1]
        if faster:
            step = max(faster, key=lambda one: one.ratio or 0.0)
            needs = f"needs {format_bytes(step.device_used_bytes)}" if step.device_used_bytes else "runs out of memory"
            gain = f"would be {(step.ratio or 1) - 1:.0%} faster if it fitted"
            return Constraint.MEMORY, f"{memory}; {step.axis} {step.value} {needs}, and {gain}"
        if self._plan.times is None or self._best.config not in self._plan.space.candidates:
            return Constraint.UNKNOWN, f"{memory}, and what its step takes is not predicted"
        breakdown = self._plan.times.at(self._plan.space.candidates.index(self._best.config)).breakdown
        shares = dict.fromkeys(Constraint, 0.0)
        for part, seconds in breakdown.items():
            shares[_CONSTRAINTS.get(part, Constraint.COMPUTE)] += seconds / sum(breakdown.values())
        largest = max(shares, key=lambda constraint: shares[constraint])
        return largest, f"{shares[largest]:.0%} of the winner's step is {largest.value}, by prediction; {memory}"
