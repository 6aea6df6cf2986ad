"""Plants a fault in the pack and runs tests that should see it, in a process of their own.

A fault is the source of one function with a few words changed. As a plugin of pytest this file plants the fault that
the process was started with, once all tests are collected.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

VARIABLE = "SPILLWAY_PLANTED_FAULT"
TESTS = Path(__file__).resolve().parents[1]
NOT_PLANTED = 70  # no exit code of pytest
MINUTES = 10  # far more than a run takes on two busy cores: a run that hangs must end
# As dev.py starts pytest: this folder must not be on sys.path.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"


class Fault(NamedTuple):
    """where: module:name or module:Class.name in the pack. words: what of its source is replaced by `others`.

    tests: the ids of tests below `tests` that should see it, the likeliest first.
    """

    where: str
    words: str
    others: str
    tests: tuple[str, ...]


ON_DEVICE = "fake_device/on_device"
# Variables of the processes in which the tests of a folder run.
FOLDERS = {ON_DEVICE: {"SPILLWAY_FAKE_CUDA": "1"}, "cuda_sim/on_aimdo": {"SPILLWAY_SIM_AIMDO": "0.6.0"}}


class Ran(NamedTuple):
    code: int
    failed: tuple[str, ...]  # ids of tests
    output: str


def run_tests(tests: tuple[str, ...], fault: Fault | None = None) -> Ran:
    """Run tests until one fails, with a fault planted or without."""
    path = [str(TESTS), os.environ.get("PYTHONPATH")]
    variables = {VARIABLE: json.dumps(fault[:3]) if fault is not None else ""}
    for folder, others in FOLDERS.items():
        if all(test.startswith(folder) for test in tests):
            variables |= others
            if folder == ON_DEVICE:
                from cuda_sim.wheels import ALWAYS, package

                path.insert(1, str(package(ALWAYS[-1])))  # which .venv need not have
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "kit.planting", "--tb=line", "-W", "ignore", "-rfE"]
    done = subprocess.run(
        [sys.executable, "-c", PYTEST, *options, *(str(TESTS / test) for test in tests)],
        cwd=TESTS.parent,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * MINUTES,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", done.stdout, re.MULTILINE)
    return Ran(done.returncode, tuple(failed), done.stdout)


def check_is_seen(fault: Fault) -> str:
    """Return the id of the first test that fails for the fault. A fault that has no place any more is an error."""
    ran = run_tests(fault.tests, fault)
    assert ran.code != NOT_PLANTED, f"the fault has no place any more:\n{ran.output[-1000:]}"
    assert ran.code != pytest.ExitCode.OK, f"nothing sees the fault:\n{ran.output[-1000:]}"
    assert ran.code == pytest.ExitCode.TESTS_FAILED and ran.failed, ran.output[-4000:]
    return ran.failed[0]


def check_passes(tests: tuple[str, ...]) -> None:
    """Check that tests pass as the code is."""
    ran = run_tests(tests)
    assert ran.code == pytest.ExitCode.OK, ran.output[-4000:]


# -- in the process that was started


def pytest_collection_finish() -> None:
    planted = os.environ.get(VARIABLE, "")
    if not planted:
        return
    try:
        plant(*json.loads(planted))
    except (ImportError, AttributeError, LookupError) as error:
        pytest.exit(f"not planted: {error}", returncode=NOT_PLANTED)


def plant(where: str, words: str, others: str) -> None:
    """Let a function have other words, in its class or module and wherever the pack has imported it by name.

    Raises LookupError where the words are not there exactly once, and ImportError or AttributeError without the place.
    """
    name, _, path = where.partition(":")
    module = importlib.import_module(f"spillway.{name}")
    *classes, name = path.split(".")
    owner = getattr(module, classes[0]) if classes else module
    bound = inspect.getattr_static(owner, name)
    real = inspect.unwrap(bound.fget if isinstance(bound, property) else getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(real))
    if source.count(words) != 1:
        raise LookupError(f"{where} has {words!r} {source.count(words)} times")
    # A class of its own around the method, so that `super()` and names with two underscores mean what they meant.
    scope = dict(vars(module))
    if classes:
        source = f"class {classes[0]}(Owner):\n{textwrap.indent(source.replace(words, others), '    ')}"
        scope["Owner"] = owner
    else:
        source = source.replace(words, others)
    code = compile(f"from __future__ import annotations\n{source}", where, "exec")
    exec(code, scope)  # noqa: S102 - the pack's own source, in a test
    if classes:
        changed = vars(scope[classes[0]])[name]
        for cell in getattr(changed, "__closure__", None) or ():
            if cell.cell_contents is scope[classes[0]]:
                cell.cell_contents = owner
        setattr(owner, name, changed)
        return
    changed = scope[name]
    for user in [user for key, user in sys.modules.items() if key.partition(".")[0] == "spillway"]:
        for key, value in list(vars(user).items()):
            if value is real or (key == name and inspect.unwrap(value) is real):
                setattr(user, key, changed)
