"""How long the soak runs: the one place that says so. Imports the standard library alone, as dev.py does."""

from __future__ import annotations

import argparse
import os
from typing import NamedTuple

TEST = "tests/soak/test_soak.py"
ONLY_SECONDS = 300  # in `dev.py test --only soak`
# The same mix in every run.
DEFAULTS = {"SECONDS": ONLY_SECONDS, "SEED": 13, "FUZZ": 2000, "KILLS": 100}


class SoakRun(NamedTuple):
    """test: the name of one in TEST. numbers: those of DEFAULTS that are others."""

    test: str
    numbers: dict[str, int]

    @property
    def title(self) -> str:
        return ", ".join([self.test, *(f"{name.lower()} {number}" for name, number in self.numbers.items())])

    @property
    def arguments(self) -> list[str]:
        return [TEST, "-k", self.test]

    @property
    def environment(self) -> dict[str, str]:
        return {f"SPILLWAY_SOAK_{name}": str(number) for name, number in self.numbers.items()}


ONLY_MIX = SoakRun("test_the_mix", {"SECONDS": ONLY_SECONDS})


def given(name: str) -> int:
    """Return a number that the tests of the soak are given."""
    return int(os.environ.get(f"SPILLWAY_SOAK_{name}", DEFAULTS[name]))


def asked_for(arguments: list[str]) -> SoakRun:
    """Read the arguments of `dev.py soak`."""
    parser = argparse.ArgumentParser(prog="dev.py soak", description="Disturb real ComfyUI servers and compare.")
    parser.add_argument("--minutes", type=float, default=ONLY_SECONDS / 60, help="of the mix; 5 if not given")
    parser.add_argument("--seed", type=int, default=DEFAULTS["SEED"])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fuzz", type=int, metavar="N", help="N prompts with inputs that make no sense instead")
    which.add_argument("--kills", type=int, metavar="N", help="N kills while saving, writing and sampling instead")
    chosen = parser.parse_args(arguments)
    seed = {"SEED": chosen.seed}
    if chosen.fuzz:
        return SoakRun("test_fuzz", {"FUZZ": chosen.fuzz, **seed})
    if chosen.kills:
        return SoakRun("test_kills", {"KILLS": chosen.kills, **seed})
    return SoakRun("test_the_mix", {"SECONDS": int(chosen.minutes * 60), **seed})
