"""The rows: which are run, what is measured of each, and which bounds it misses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kit.virtual.devices import GIB, MACHINES, Machine
from kit.virtual.layers import Model
from kit.virtual.models import MODELS

from .engine import Steps, run_engine
from .limits import limits, ram_for_weights
from .peers import PEERS
from .work import Work, work_of

RAM_GB = (16, 32, 64)
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
FORMS = tuple((dtype, lora) for lora in (False, True) for dtype in ("bf16", "fp8", "int8"))
LATER, SECOND, FIRST = 1.05, 1.10, 1.10
LEFT_TO_COMPUTING = GIB // 2  # the least of a card's memory that weights leave free


@dataclass(frozen=True)
class Case:
    """What a row is about."""

    model: str
    gpu: str
    ram_gb: int
    dtype: str
    lora: bool
    share: float

    @property
    def machine(self) -> Machine:
        return MACHINES[self.gpu]

    def make(self) -> Model:
        model = MODELS[self.model]()
        model.store(self.dtype)
        return model


class Runner:
    """Runs cases. RAM sizes between which nothing differs are run once."""

    def __init__(self) -> None:
        self._works: dict[tuple, Work] = {}
        self._rows: dict[tuple, dict[str, Any]] = {}

    def work(self, case: Case) -> Work:
        key = (case.model, case.gpu, case.dtype, case.lora)
        if key not in self._works:
            self._works[key] = work_of(case.make(), case.machine, case.dtype, case.lora)
        return self._works[key]

    def fits(self, case: Case) -> bool:
        """Say whether the card has room for that share."""
        return self.work(case).nbytes * case.share <= case.machine.vram - LEFT_TO_COMPUTING

    def row(self, case: Case) -> dict[str, Any]:
        """Return a row with figures."""
        ram = ram_for_weights(case.ram_gb)
        # In twice the model's bytes of RAM, for pins and the page cache, nothing is short.
        ample = 2 * self.work(case).source + 8 * GIB
        key = (case.model, case.gpu, case.dtype, case.lora, case.share, min(ram, ample))
        if key not in self._rows:
            self._rows[key] = self._measure(case)
        return {**self._rows[key], "ram_gb": case.ram_gb}

    def _measure(self, case: Case) -> dict[str, Any]:
        work = self.work(case)
        budget = int(work.nbytes * case.share)
        least = limits(work, case.machine, case.ram_gb, budget)
        steps = self.run(case)
        peers = {
            peer.name: round(peer(work, case.machine, case.ram_gb, budget).seconds() / least.step, 3) for peer in PEERS
        }
        return {
            "model": case.model,
            "gpu": case.gpu,
            "ram_gb": case.ram_gb,
            "dtype": case.dtype,
            "lora": case.lora,
            "share": case.share,
            "pinned": least.pinned,
            "step_s": round(max(steps.seconds[-2:]), 5),
            "compute_s": round(steps.compute_s, 5),
            "bus_s": round(steps.bus_s, 5),
            "reader_s": round(steps.reader_s, 5),
            "step_over_ideal": round(max(steps.seconds[-2:]) / least.step, 3),
            "second_over_ideal": round(steps.seconds[1] / least.step, 3),
            "first_over_limit": round(steps.seconds[0] / least.first, 3),
            "peers": peers,
        }

    def run(self, case: Case, spans: bool = False) -> Steps:
        """Run the engine alone."""
        budget = None if case.share == 1 else int(self.work(case).nbytes * case.share)
        return run_engine(case.make(), case.machine, case.ram_gb, case.dtype, case.lora, budget, spans=spans)


def cases(only: str | None, gpu: str | None, short: bool) -> Iterator[Case]:
    """List the cases. only, gpu: parts of names. short: the choice that takes a minute."""
    for model in MODELS:
        for name in MACHINES:
            if (only and only.lower() not in model.lower()) or (gpu and gpu.lower() not in name.lower()):
                continue
            for dtype, lora in FORMS:
                for ram_gb in RAM_GB:
                    for share in SHARES:
                        case = Case(model, name, ram_gb, dtype, lora, share)
                        if not short or _in_short(case):
                            yield case


def _in_short(case: Case) -> bool:
    """Choose a few of each kind."""
    if (case.dtype, case.lora) not in (("bf16", False), ("bf16", True), ("int8", False)):
        return False
    if case.model not in ("Flux 1024", "Flux 512", "Wan 14B 480p, 17 frames", "Z-Image 1024", "UMT5-XXL"):
        return False
    if not case.gpu.startswith(("4060 ", "4090", "5090")) or case.share not in (0.75, 0.25, 0.0):
        return False
    return case.ram_gb in ((16, 64) if case.dtype == "bf16" and not case.lora else (32,))


def misses(row: dict[str, Any]) -> list[str]:
    """Name the bounds that a row misses."""
    bounds = {"step_over_ideal": LATER, "second_over_ideal": SECOND, "first_over_limit": FIRST}
    missed = [name for name, bound in bounds.items() if row[name] > bound]
    if row["share"] < 1 and any(row["step_over_ideal"] > ratio for ratio in row["peers"].values()):
        missed.append("peers")
    return missed
