"""The fake device's own tests, and the engine's on it, in processes of their own: torch.cuda is another one there.

    python dev.py test tests/fake_device

By hand, for a debugger: SPILLWAY_FAKE_CUDA=1 python -m pytest tests/fake_device/on_device
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_sim import Unavailable
from cuda_sim import build as driver_build
from fake_device import build
from fake_device.device import VARIABLE
from kit.skips import skip_loudly

TESTS = Path(__file__).resolve().parents[1]
ON_DEVICE = TESTS / "fake_device" / "on_device"
MINUTES = 20  # far more than a run takes on two busy cores: a run that hangs must end


@pytest.mark.parametrize("name", sorted(path.stem for path in ON_DEVICE.glob("test_*.py")))
def test_on_the_fake_device(name):
    try:
        driver_build.driver()
        build.device()
    except Unavailable as reason:
        skip_loudly(f"the fake device: {reason}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore"]
    done = subprocess.run(
        [*command, str(ON_DEVICE / f"{name}.py")],
        env={**os.environ, VARIABLE: "1", "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    if done.returncode:
        pytest.fail(f"pytest ended with code {done.returncode}\n{(done.stdout + done.stderr)[-12000:]}", pytrace=False)
