"""A model larger than the memory that ComfyUI may have runs to its end, also after images that the cache keeps.

The limit is a control group's where one can be made, as by root. Elsewhere SPILLWAY_RAM_GB says it, and the peak of
private memory stands for the kernel, which would end the process beyond the limit.
"""

import os
import shutil
from pathlib import Path

import pytest

from kit.comfyui.fresh_process import LINUX, run_script
from kit.limited import control_group, killed_in

GIB = 1 << 30
BIG = {"hidden": 3072, "depth": 2, "depth_single": 9, "context": 4096, "pooled": 768}  # 3.8 GiB
SMALL = {"hidden": 1024, "depth": 2, "depth_single": 2, "context": 512, "pooled": 256}  # 0.2 GiB


@pytest.fixture
def model(checkpoint, models_dir, request):
    """A file in the folder of diffusion models, which is gone afterwards."""
    path = Path(checkpoint("flux", **request.param))
    there = models_dir / "diffusion_models" / path.name
    shutil.move(path, there)
    yield there
    there.unlink()


def run(model, limit, images):
    """Run the model in `limit` bytes after `images` of 100 MiB each. Pages of its file count from the first on."""
    with open(model, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with control_group(limit) as group:
        variables = {} if group is not None else {"SPILLWAY_RAM_GB": str(limit / GIB)}
        said = run_script("little_memory.py", model.name, str(images), "100", "2", around=group, **variables)
        assert group is None or not killed_in(group)
    assert said["peak"] < limit
    return said


@LINUX
@pytest.mark.parametrize("model", [SMALL], indirect=True)
def test_a_small_model_in_little_memory(model):
    """Its weights take 434 MiB, as ComfyUI computes in float32 on a CPU."""
    said = run(model, GIB, images=4)
    offloaded = [line for line in said["log"] if "Flux: offloaded" in line]
    assert said["evicted"] and offloaded and all(" of 1.0 GiB, " in line for line in offloaded), said["log"]


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("model", [BIG], indirect=True)
def test_a_model_of_almost_four_gigabytes_in_three_two_and_one(model):
    """Its weights take 7.5 GiB. The bits are those of a run with all memory, however little there is."""
    wanted = run_script("little_memory.py", model.name, "0", "100", "2")["digest"]
    for limit in (3, 2, 1):
        for images in (0, 20):
            assert run(model, limit * GIB, images)["digest"] == wanted
