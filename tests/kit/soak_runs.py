"""How long the soak runs: the one place that says so. Imports the standard library alone, as dev.py does."""

from __future__ import annotations

import argparse
import os

SOAK = "tests/soak"
PLAIN_SECONDS = 90  # in `dev.py test`
ONLY_SECONDS = 300  # in `dev.py test --only soak`
# The same mix in every run of CI.
DEFAULTS = {"SECONDS": PLAIN_SECONDS, "SEED": 13, "FUZZ": 2000, "KILLS": 100}


def given(name: str) -> int:
    """Return a number that the environment gives to the tests of the soak."""
    return int(os.environ.get(f"SPILLWAY_SOAK_{name}", DEFAULTS[name]))


def variables(**numbers: int) -> dict[str, str]:
    return {f"SPILLWAY_SOAK_{name}": str(number) for name, number in numbers.items()}


def parse(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Read the arguments of `dev.py soak`. Returns those of pytest, and the variables."""
    parser = argparse.ArgumentParser(prog="dev.py soak", description="Disturb real ComfyUI servers and compare.")
    parser.add_argument("--minutes", type=float, default=ONLY_SECONDS / 60, help="of the mix; 5 if not given")
    parser.add_argument("--seed", type=int, default=DEFAULTS["SEED"])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fuzz", type=int, metavar="N", help="N prompts with inputs that make no sense instead")
    which.add_argument("--kills", type=int, metavar="N", help="N kills while saving, writing and sampling instead")
    chosen = parser.parse_args(arguments)
    wanted = "test_fuzz" if chosen.fuzz else "test_kills" if chosen.kills else "test_the_mix"
    numbers = {"SECONDS": int(chosen.minutes * 60), "SEED": chosen.seed}
    numbers |= {"FUZZ": chosen.fuzz} if chosen.fuzz else {}
    numbers |= {"KILLS": chosen.kills} if chosen.kills else {}
    return [f"{SOAK}/test_soak.py", "-s", "-k", wanted], variables(**numbers)
