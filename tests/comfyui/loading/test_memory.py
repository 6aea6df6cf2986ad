"""A 2 GB model costs next to nothing to load, and nothing once it is gone. Measured in a process of its own."""

import os
from pathlib import Path

import pytest

from kit.comfyui.fresh_process import run_script
from kit.comfyui.pairs import SMALL

BIG = {"hidden": 3072, "context": 4096, "pooled": 768}


@pytest.fixture(scope="module")
def measured(checkpoint, models_dir):
    big, small = (Path(checkpoint("flux", **sizes)) for sizes in (BIG, SMALL))
    for path in (big, small):
        os.replace(path, models_dir / "diffusion_models" / path.name)
    try:
        yield run_script("measure_memory.py", big.name, small.name)
    finally:
        (models_dir / "diffusion_models" / big.name).unlink()
        os.replace(models_dir / "diffusion_models" / small.name, small)


@pytest.mark.slow
def test_loading_is_quick_and_small(measured):
    assert measured["size"] > 1900
    assert min(measured["seconds"]) < 1.0
    assert measured["loaded"] - measured["before"] < 200


@pytest.mark.slow
def test_memory_comes_back_after_unloading_and_dropping(measured):
    assert 0 < measured["resident"] <= measured["peak"] <= measured["budget"]
    assert measured["stepped"] - measured["before"] < 1000  # ComfyUI keeps 6 GB of the same model
    assert measured["resident after"] == 0
    assert measured["unloaded"] - measured["before"] < 200
    assert measured["dropped"] - measured["before"] < 100
