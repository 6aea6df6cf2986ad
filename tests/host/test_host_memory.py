"""A 2 GB model costs next to nothing to load, and nothing once it is gone. Measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BASE, COMFYUI, ROOT
from pairs import SMALL

BIG = {"hidden": 3072, "context": 4096, "pooled": 768}


@pytest.fixture(scope="module")
def measured(checkpoint, models_dir):
    big, small = (Path(checkpoint("flux", **sizes)) for sizes in (BIG, SMALL))
    for path in (big, small):
        os.replace(path, models_dir / "diffusion_models" / path.name)
    try:
        script = Path(__file__).with_name("measure_memory.py")
        done = subprocess.run(
            [sys.executable, script, COMFYUI, ROOT, BASE, big.name, small.name],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout.splitlines()[-1])
    finally:
        (models_dir / "diffusion_models" / big.name).unlink()
        os.replace(models_dir / "diffusion_models" / small.name, small)


@pytest.mark.slow
def test_loading_is_quick_and_small(measured):
    assert measured["size"] > 1900
    assert min(measured["seconds"]) < 1.0
    assert measured["loaded"] - measured["before"] < 200


@pytest.mark.slow
def test_memory_comes_back(measured):
    assert 0 < measured["resident"] <= measured["peak"] <= measured["budget"]
    assert measured["stepped"] - measured["before"] < 1000  # the core keeps 6 GB of the same model
    assert measured["resident after"] == 0
    assert measured["unloaded"] - measured["before"] < 200
    assert measured["dropped"] - measured["before"] < 100
