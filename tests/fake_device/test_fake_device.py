"""The fake device's own tests, and the engine's on it, in a process of their own: torch.cuda is another one there.

    python dev.py test tests/fake_device

By hand, for a debugger: SPILLWAY_FAKE_CUDA=1 python -m pytest tests/fake_device/on_device
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_sim import Unavailable
from cuda_sim import build as driver_build
from cuda_sim.reporting import VARIABLE as REPORT
from cuda_sim.wheels import ALWAYS, package
from fake_device import build
from fake_device.device import VARIABLE
from kit.skips import skip_loudly

TESTS = Path(__file__).resolve().parents[1]
ON_DEVICE = TESTS / "fake_device" / "on_device"
MINUTES = 20  # far more than a run takes on two busy cores: a run that hangs must end


FILES = sorted(path.stem for path in ON_DEVICE.glob("test_*.py"))


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory):
    """What happened in one process for all files that are wanted, its exit code and its output."""
    try:
        driver_build.driver()
        build.device()
        aimdo = package(ALWAYS[-1])  # which .venv need not have
    except Unavailable as reason:
        skip_loudly(f"the fake device: {reason}")
    wanted = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}
    marks = request.config.option.markexpr  # such as "not slow"
    report = tmp_path_factory.mktemp("reports") / "on_device.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cuda_sim.reporting", "--tb=short"]
    done = subprocess.run(
        [*command, "-W", "ignore", "-m", marks, *(str(ON_DEVICE / f"{name}.py") for name in sorted(wanted))],
        env={**os.environ, VARIABLE: "1", REPORT: str(report), "PYTHONPATH": os.pathsep.join(map(str, (TESTS, aimdo)))},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    entries = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    return entries, done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", FILES)
def test_on_the_fake_device(name, ran):
    entries, code, output = ran
    if code < 0:
        last = entries[-1]["test"] if entries else "the start"
        pytest.fail(f"signal {-code} during {last}\n{output[-12000:]}", pytrace=False)
    mine = [entry for entry in entries if entry["event"] != "start" and f"/{name}.py" in f"/{entry['test']}"]
    failed = [entry["text"] for entry in mine if entry["outcome"] == "failed"]
    assert code in (0, 1), output[-12000:]
    assert not failed, "\n".join(failed)[-12000:]
    assert any(entry["event"] == "call" and entry["outcome"] == "passed" for entry in mine), output[-12000:]
