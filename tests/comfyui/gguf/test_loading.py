"""A GGUF file costs next to nothing to load, and at a budget no more than that. Measured in a process of its own.

One of 0.3 GB runs always, and one of 2 GB with --slow.
"""

import os
from pathlib import Path

import pytest
import torch

from kit.comfyui.checkpoints.diffusion_models import flux_entries
from kit.comfyui.fresh_process import run_script
from kit.comfyui.pairs import SMALL
from kit.gguf_files import random_blocks, write_gguf
from spillway.ops.gguf.types import IDS, TYPES

KIND, WIDTH = "Q4_K", 3072
DEPTHS = {0.3: (1, 2), 2: (4, 15)}  # double and single blocks


def write_flux(path, depth, depth_single):
    """Write a Flux of full width. All its matrices begin with the same blocks, of which few have to be made."""
    pool = random_blocks(KIND, WIDTH * 7 * WIDTH)
    tensors = {}
    for name, (shape, *_) in flux_entries(torch.float16, WIDTH, depth, depth_single).items():
        if len(shape) == 2 and shape[1] % TYPES[IDS[KIND]].numbers == 0:
            tensors[name] = (KIND, shape, pool[: shape[0] * shape[1] // TYPES[IDS[KIND]].numbers])
        else:
            tensors[name] = torch.zeros(shape, dtype=torch.float16)
    return Path(write_gguf(path, tensors))


@pytest.mark.parametrize("size", [0.3, pytest.param(2, marks=pytest.mark.slow)], ids=lambda size: f"{size} GB")
def test_loading_is_quick_and_small(size, checkpoint, models_dir):
    folder = models_dir / "diffusion_models"
    small = Path(checkpoint("flux", **SMALL))
    big = write_flux(folder / "large.gguf", *DEPTHS[size])
    os.replace(small, folder / small.name)
    nbytes = big.stat().st_size
    assert nbytes > 0.9e9 * size
    try:
        found = run_script("measure_memory.py", big.name, small.name, str(nbytes // 5))
    finally:
        big.unlink()
        os.replace(folder / small.name, small)
    assert min(found["seconds"]) < 1.0
    assert found["loaded"] - found["before"] < 200
    assert 0 < found["resident"] <= found["peak"] <= found["budget"]
    assert found["dropped"] - found["before"] < 100
