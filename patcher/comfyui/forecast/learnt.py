"""Keeps what runs on this machine have shown: what computations take, the bus, how long steps take and wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....ops.device.identity import device_name
from ....ops.never_raises import never_raises
from ...dynamic_model import DynamicModel
from ...json_record import read_record, write_record
from ...order_record import structure
from ...step_time import Pace
from ..first_use import record_file

MOST = 128  # of each, models at sizes; the one that was noted longest ago goes first
SAME_BUDGET = 0.05  # of the weights
PLANS = 4  # of one model at one size
MOST_BYTES = 1 << 60  # what ComfyUI asks for at most: more was never measured
MOST_SECONDS = 24 * 3600  # of one layer
MORE = 1.02
PEAKS, PACES, BUSES, WAITS = "peaks", "paces", "buses", "waits"


def learnt_file(name: str) -> Path:
    """Where one of these records lies."""
    return record_file().with_name(f"{name}.json")


def key_of(model: DynamicModel, size: str) -> str:
    """Name a model, its number format, how many weights are patched, and a size of `sizes`."""
    patched = sum(param.patch is not None for bundle in model.bundles for param in bundle.params)
    return f"{structure(model.bundles)} {model.number_format} {patched} {size} {_device(model)}"


@never_raises("noting the peak of a run")
def note_peak(model: DynamicModel, size: str, peak: int, weights: int, plan: tuple[int, int]) -> None:
    """Note the peak of a run, and what of it was not of weights, as a forecast counts them.

    plan: bytes that stayed, and that each step brought.
    """
    key, budget = key_of(model, size), budget_of(model)
    others = [one for one in _peaks(key).plans if (*one[:2], one[4]) != (*plan, budget)][1 - PLANS :]
    beside, asked = max(0, peak - weights), model.remembered.expected
    known = {"beside": beside, "asked": asked, "plans": [*others, [*plan, peak, beside, budget]]}
    _put(PEAKS, key, known)


def budget_of(model: DynamicModel) -> int:
    """Give the bytes that the policy allows, which say what is on its way beside what stays; 0 for no such limit."""
    return model.policy.vram_bytes or 0


@never_raises("noting how fast steps are")
def note_pace(model: DynamicModel, size: str) -> None:
    """Note how fast the steps were, where that was measured."""
    key, pace = key_of(model, size), model.pace
    if pace is not None:
        _put(PACES, key, [pace.seconds.get(bundle, 0.0) for bundle in model.bundles])
        _put(BUSES, _device(model), pace.bus)


@never_raises("noting the waits of a run")
def note_waits(model: DynamicModel, size: str, plan: tuple[int, int]) -> None:
    """Note how long a step of a plan took, and of that how long it waited for the bus and for readers."""
    key, step = key_of(model, size), model.ledger.step
    if step.seconds > 0:
        others = [one for one in _waits(key) if one.plan != plan][1 - PLANS :]
        waits = [*others, Waits(plan, step.seconds, waited(model), step.stalled)]
        _put(WAITS, key, [[*one.plan, one.seconds, one.waited, one.stalled] for one in waits])


def waited(model: DynamicModel) -> float | None:
    """Give the seconds of the last step that were no computing; None where nobody has timed that."""
    step, pace = model.ledger.step, model.pace
    return None if pace is None or not step.seconds else max(0.0, step.seconds - sum(pace.seconds.values()))


@dataclass(frozen=True)
class Waits:
    """What a step of a plan took. plan: bytes that stay, and that it brings. waited: seconds that were no computing,
    None where that is not known. stalled: seconds for which whoever launches waited for readers.
    """

    plan: tuple[int, int]
    seconds: float
    waited: float | None
    stalled: float


def waits_of(model: DynamicModel, size: str, plan: tuple[int, int]) -> tuple[Waits | None, float]:
    """Give what a step of this plan took, None where it has not run -> (that, seconds that readers would stall it)."""
    known = _waits(key_of(model, size))
    seen = next((one for one in known if one.plan == plan), None)
    # Readers bring what a step streams, so what another plan waited for them goes by its bytes.
    rates = [one.stalled / one.plan[1] for one in known[-1:] if one.plan[1]]
    return seen, sum(rates) * plan[1] if seen is None else seen.stalled


def _waits(key: str) -> list[Waits]:
    found = read_record(learnt_file(WAITS), WAITS).get(key)
    plans = found[-PLANS:] if isinstance(found, list) else []
    return [
        Waits((stays, streamed), seconds, waited, stalled)
        for stays, streamed, seconds, waited, stalled in (
            one for one in plans if isinstance(one, list) and len(one) == 5
        )
        if all(isinstance(one, int) and _is_number(one) and 0 <= one <= MOST_BYTES for one in (stays, streamed))
        and all(_is_number(one) and 0 <= one < MOST_SECONDS for one in (seconds, stalled))
        and (waited is None or (_is_number(waited) and 0 <= waited < MOST_SECONDS))
    ]


@dataclass(frozen=True)
class Peaks:
    """Of a model at a size. beside: bytes that were not of weights when it last ran; None where it never has.

    asked: what ComfyUI said then that it needs. plans: [resident, streamed, peak, beside, budget] of the last runs.
    """

    beside: int | None = None
    asked: int = 0
    plans: tuple[list[int], ...] = ()

    def shown(self, asked: int) -> int | None:
        """Give what the computation takes; None where that is not known, or ComfyUI asks for clearly more than then.

        It does where a ControlNet or longer conditions take part, which the size does not tell.
        """
        return self.beside if asked <= MORE * self.asked else None

    def beside_in(self, resident: int, streamed: int) -> int | None:
        """Give what a run of another plan takes beside its weights, as the nearest plan has shown; None for no run.

        A run that brings nothing says little of one that does: weights that are made on their way take memory too.
        """
        alike = [plan for plan in self.plans if (plan[1] > 0) == (streamed > 0)]
        return min(alike, key=lambda plan: abs(plan[0] - resident))[3] if alike else self.beside

    def of(self, resident: int, streamed: int, budget: int) -> int | None:
        """Give the peak of a run of the same plan within the same budget; None where there was none.

        Budgets that differ by little of the weights are one.
        """
        same = SAME_BUDGET * (resident + streamed)
        alike = [one for one in self.plans if one[:2] == [resident, streamed] and abs(one[4] - budget) <= same]
        return min(alike, key=lambda one: abs(one[4] - budget))[2] if alike else None


def peaks_of(model: DynamicModel, size: str) -> Peaks:
    """Give what is known of the peaks of a model at a size."""
    return _peaks(key_of(model, size))


def _peaks(key: str) -> Peaks:
    found = read_record(learnt_file(PEAKS), PEAKS).get(key)
    try:
        plans = [[int(number) for number in plan] for plan in found["plans"][-PLANS:] if len(plan) == 5]
        known = Peaks(int(found["beside"]), int(found["asked"]), tuple(plans))
    except (KeyError, TypeError, ValueError, OverflowError):
        return Peaks()
    numbers = [known.beside or 0, known.asked, *(number for plan in known.plans for number in plan)]
    return known if all(0 <= number <= MOST_BYTES for number in numbers) else Peaks()


def bus_of(model: DynamicModel) -> float | None:
    """Give the measured bytes a second of the device's bus; None where nobody has measured it."""
    found = read_record(learnt_file(BUSES), BUSES).get(_device(model))
    return float(found) if _is_number(found) and 0 < found < MOST_BYTES else None


@never_raises("recalling how fast steps were")
def recall_pace(model: DynamicModel, size: str) -> None:
    """Let a model that has run no step know how long those of this size took when they were last timed."""
    if model.remembered.pace is not None and not model.remembered.recalled:
        return
    seconds, bus = read_record(learnt_file(PACES), PACES).get(key_of(model, size)), bus_of(model)
    is_one = isinstance(seconds, list) and len(seconds) == len(model.bundles)
    if bus is not None and is_one and all(_is_number(second) and 0 <= second < MOST_SECONDS for second in seconds):
        model.remembered.recall_pace(Pace(dict(zip(model.bundles, map(float, seconds), strict=True)), bus))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _put(name: str, key: str, value: Any) -> None:
    path = learnt_file(name)
    known: Mapping[str, Any] = read_record(path, name)
    if known.get(key) == value:
        return
    kept = [(one, found) for one, found in known.items() if one != key][1 - MOST :]
    write_record(path, name, {**dict(kept), key: value})


def _device(model: DynamicModel) -> str:
    return f"{device_name(model.device)} ({model.device})"
