"""The rows: which are run, what is measured of each, and which bounds it misses."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
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
# Of another process, which knows the order and the pace of a step; shown, and not among a row's figures.
AGAIN, SECOND_AGAIN = "first_again_over_limit", "second_again_over_ideal"
STRIDES = (3, 5, 7, 11, 13)  # of the columns, by which rows are left out
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


class Runner:
    """Runs cases. RAM sizes between which nothing differs are run once."""

    def __init__(self) -> None:
        self._model: tuple[tuple, Model] | None = None
        self._works: dict[tuple, Work] = {}
        self._rows: dict[tuple, dict[str, Any]] = {}

    def model(self, case: Case) -> Model:
        """Return the model in the form of its file, the one of the case before where it is the same."""
        key = (case.model, case.dtype == "fp8")
        if self._model is None or self._model[0] != key:
            model = MODELS[case.model]()
            model.store(case.dtype)
            self._model = key, model
            gc.collect()  # cycles of engines that have ended
        return self._model[1]

    def work(self, case: Case) -> Work:
        key = (case.model, case.gpu, case.dtype, case.lora)
        if key not in self._works:
            self._works[key] = work_of(self.model(case), case.machine, case.dtype, case.lora)
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
        with TemporaryDirectory() as folder:
            orders_file = Path(folder) / "orders.json"
            steps = self.run(case, orders_file=orders_file)
            again = self.run(case, orders_file=orders_file, most=2, known=steps.known)
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
            AGAIN: round(again.seconds[0] / least.first, 3),
            SECOND_AGAIN: round(again.seconds[1] / least.step, 3),
            "peers": peers,
        }

    def run(self, case: Case, **options: Any) -> Steps:
        """Run the engine alone. options: see `run_engine`."""
        budget = None if case.share == 1 else int(self.work(case).nbytes * case.share)
        return run_engine(self.model(case), case.machine, case.ram_gb, case.dtype, case.lora, budget, **options)


def cases(every: int) -> Iterator[Case]:
    """List one case in `every` of the whole grid, such that any two values of two columns occur together."""
    columns = (MODELS, FORMS, MACHINES, RAM_GB, SHARES)
    for place in itertools.product(*(range(len(column)) for column in columns)):
        if sum(step * index for step, index in zip(STRIDES, place, strict=True)) % every == 0:
            model, (dtype, lora), gpu, ram_gb, share = (
                list(column)[index] for column, index in zip(columns, place, strict=True)
            )
            yield Case(model, gpu, ram_gb, dtype, lora, share)


def misses(row: dict[str, Any]) -> list[str]:
    """Name the bounds that a row misses."""
    bounds = {"step_over_ideal": LATER, "second_over_ideal": SECOND, "first_over_limit": FIRST}
    missed = [name for name, bound in bounds.items() if row[name] > bound]
    # Less than half a per cent apart is a tie.
    if row["share"] < 1 and any(row["step_over_ideal"] > ratio + 0.005 for ratio in row["peers"].values()):
        missed.append("peers")
    return missed
