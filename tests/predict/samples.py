"""Rates of a machine that does not exist."""

from autotune.predict.machine import Curve, MachineRates

_WORK = ("product", "attention", "attention_backward", "moved")
_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")

_WORK_RATES: dict[str, dict[str, Curve]] = {
    work: {"fp32": ((1e4, 1e-6), (1e8, 1e-2)), "bf16": ((1e4, 2e-6), (1e8, 1e-2))} for work in _WORK
}
_COLLECTIVE_RATES: dict[str, dict[str, Curve]] = {work: {"bytes": ((1e3, 3e-4), (1e7, 1e-2))} for work in _COLLECTIVES}

RATES = MachineRates(
    call_seconds=1e-5,
    sharded_call_seconds=3e-5,
    work=_WORK_RATES | _COLLECTIVE_RATES,
)
