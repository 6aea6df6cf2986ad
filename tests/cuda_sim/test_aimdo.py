"""Real comfy-aimdo on the simulated driver: each release in a process of its own, with the VBAR suite and the engine.

    python dev.py test tests/cuda_sim/test_aimdo.py -k 0.6.0

One release by hand, for a debugger: SPILLWAY_SIM_AIMDO=0.6.0 python -m pytest tests/vbar
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_sim import Unavailable, build
from cuda_sim.aimdo import VARIABLE
from cuda_sim.reporting import VARIABLE as REPORT
from cuda_sim.wheels import ALWAYS, VERSIONS, package
from kit.skips import skip_loudly

TESTS = Path(__file__).resolve().parents[1]
SUITE = ["vbar", "cuda_sim/on_aimdo"]
MINUTES = 20  # far more than a run takes on two busy cores: a run that hangs must end


def run_suite(version, report):
    """Run the suite on a release; returns the exit status and what was printed. Raises Unavailable."""
    build.driver()
    package(version)
    environment = {**os.environ, VARIABLE: version, REPORT: str(report), "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cuda_sim.reporting", "--tb=short"]
    done = subprocess.run(
        [*command, *(str(TESTS / name) for name in SUITE)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The suite's runs by release, two at a time: each is busy with one core."""
    wanted = {item.callspec.params["version"] for item in request.session.items if item.module is request.module}
    folder = tmp_path_factory.mktemp("reports")
    with ThreadPoolExecutor(2) as pool:
        reports = {version: folder / f"{version}.jsonl" for version in VERSIONS if version in wanted}
        yield {version: (pool.submit(run_suite, version, report), report) for version, report in reports.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "version",
    [pytest.param(each, marks=[] if each in ALWAYS else pytest.mark.every_release) for each in VERSIONS],
)
def test_the_engine_on_comfy_aimdo(runs, version):
    run, report = runs[version]
    try:
        code, output = run.result()
    except Unavailable as reason:
        skip_loudly(f"comfy-aimdo {version} on the simulated driver: {reason}")
    entries = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    passed = sum(entry["event"] == "call" and entry["outcome"] == "passed" for entry in entries)
    if code < 0:
        last = entries[-1]["test"] if entries else "the start"
        pytest.fail(f"comfy-aimdo {version}: signal {-code} during {last}\n{output[-4000:]}", pytrace=False)
    assert code == 0, output[-8000:]
    assert passed > 150, f"comfy-aimdo {version}: only {passed} tests ran"
