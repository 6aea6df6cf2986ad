"""The fake device's own tests, and the engine's on it, in processes of their own: torch.cuda is another one there.

    python -m pytest tests/test_fake_device.py

By hand, for a debugger: SPILLWAY_FAKE_CUDA=1 PYTHONPATH=tests python -m pytest tests/fake_device
"""

import os
import subprocess
import sys
from pathlib import Path

import loud
import pytest
from cuda_sim import Unavailable
from cuda_sim import build as driver_build
from fake_device import build
from fake_device.device import VARIABLE

TESTS = Path(__file__).resolve().parent
MINUTES = 8


@pytest.mark.parametrize("name", sorted(path.stem for path in (TESTS / "fake_device").glob("test_*.py")))
def test_on_the_fake_device(name):
    try:
        driver_build.driver()
        build.device()
    except Unavailable as reason:
        loud.skip(f"the fake device: {reason}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore"]
    done = subprocess.run(
        [*command, str(TESTS / "fake_device" / f"{name}.py")],
        env={**os.environ, VARIABLE: "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    if done.returncode:
        pytest.fail(f"pytest ended with code {done.returncode}\n{(done.stdout + done.stderr)[-12000:]}", pytrace=False)
