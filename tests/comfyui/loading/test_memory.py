"""A model costs next to nothing to load, and nothing once it is gone. Measured in a process of its own.

A model of 0.6 GB runs always, and one of 2 GB with --slow.
"""

import os
from pathlib import Path

import pytest

from kit.comfyui.fresh_process import run_script
from kit.comfyui.pairs import SMALL

SIZES = {0.6: {"hidden": 1664, "context": 4096, "pooled": 768}, 2: {"hidden": 3072, "context": 4096, "pooled": 768}}


@pytest.fixture(scope="module", params=[0.6, pytest.param(2, marks=pytest.mark.slow)], ids=lambda size: f"{size} GB")
def measured(checkpoint, models_dir, request):
    big, small = (Path(checkpoint("flux", **sizes)) for sizes in (SIZES[request.param], SMALL))
    budget = big.stat().st_size // 5
    for path in (big, small):
        os.replace(path, models_dir / "diffusion_models" / path.name)
    try:
        yield run_script("measure_memory.py", big.name, small.name, str(budget))
    finally:
        (models_dir / "diffusion_models" / big.name).unlink()
        os.replace(models_dir / "diffusion_models" / small.name, small)


def test_loading_is_quick_and_small(measured):
    assert measured["size"] > 550
    assert min(measured["seconds"]) < 1.0
    assert measured["loaded"] - measured["before"] < 200


def test_memory_comes_back_after_unloading_and_dropping(measured):
    assert 0 < measured["resident"] <= measured["peak"] <= measured["budget"]
    assert measured["stepped"] - measured["before"] < measured["size"] / 2  # ComfyUI keeps three times its size
    assert measured["resident after"] == 0
    assert measured["unloaded"] - measured["before"] < 200
    assert measured["dropped"] - measured["before"] < 100
