"""Memory of the process: what is mapped, used, dropped and given back, by the resident size that the system reports."""

import ctypes
import gc
import json
import math
import struct
import subprocess
import sys

import psutil
import pytest
import torch

from kit.nets import Stack, dynamic, plain, same, write
from kit.pack import ROOT
from kit.sim_device import SimDevice

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size as Linux counts it")

MB = 1_000_000


def build():
    return Stack(16, 1024)  # 67 MB in float32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "m.safetensors"
    write(path, build())
    gc.collect()
    return path


def rss():
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what the C library keeps for later is not held by us
    return psutil.Process().memory_info().rss


def run(model):
    return model(model.module.input())


def test_nothing_of_the_file_is_read_before_the_first_forward(path):
    before = rss()
    model = dynamic(build, path)
    assert rss() - before < 5 * MB
    run(model)
    assert rss() - before > 60 * MB
    model.close()


@pytest.mark.parametrize("end", ["close", "release", "drop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_is_given_back(path, end, dtype):
    run(dynamic(build, path, dtype, vram_bytes=0))  # what torch itself allocates for a first run
    before = rss()
    model = dynamic(build, path, dtype)
    run(model)
    assert rss() - before > 30 * MB
    module = model.module
    if end == "drop":
        del model, module
    else:
        getattr(model, end)()
    assert rss() - before < 8 * MB


@pytest.mark.parametrize("fraction", [0.5, 0.0])
def test_without_room_only_the_resident_part_and_a_bundle_are_held(path, fraction):
    run(dynamic(build, path, vram_bytes=0))
    before = rss()
    model = dynamic(build, path)
    model.set_policy(model.policy.with_changes(vram_bytes=int(model.total_bytes * fraction)))
    for _ in range(2):
        run(model)
    assert rss() - before < model.total_bytes * fraction + 10 * MB
    model.close()


def test_an_evicted_weight_leaves_the_process(path):
    model = dynamic(build, path)
    run(model)
    before = rss()
    assert before - (model.free(), rss())[1] > 60 * MB
    model.close()


@pytest.mark.parametrize("device", [lambda: None, SimDevice], ids=["cpu", "device"])
def test_two_models_that_alternate_do_not_grow(tmp_path, device):
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    states = [write(path, Stack(4, 64), torch.bfloat16, seed) for seed, path in enumerate(paths)]
    device = device()
    models = [dynamic(lambda: Stack(4, 64), path, device=device) for path in paths]
    models[1].set_policy(models[1].policy.with_changes(vram_bytes=models[1].total_bytes // 2))
    expected = [run_plain(state) for state in states]

    def alternate(times):
        for index in range(times):
            model = models[index % 2]
            if index % 7 == 0:
                model.set_patches({"layers.1.weight": torch.neg})
                run(model)
                model.set_patches({})
            assert same(run(model), expected[index % 2])
            if index % 10 == 0:
                model.free()

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    alternate(40)
    before, memory = tensors(), rss()
    alternate(200)
    assert tensors() == before
    assert rss() - memory < 4 * MB


def run_plain(state):
    module = plain(lambda: Stack(4, 64), state, torch.float32)
    return module(module.input())


def test_models_that_come_and_go_do_not_grow(tmp_path):
    write(tmp_path / "m.safetensors", Stack(4, 64), torch.bfloat16)

    def come_and_go(times):
        for index in range(times):
            model = dynamic(lambda: Stack(4, 64), tmp_path / "m.safetensors", device=None if index % 2 else SimDevice())
            run(model)
            if index % 3:
                model.close()

    come_and_go(20)
    memory, maps = rss(), len(psutil.Process().memory_maps(grouped=False))
    come_and_go(200)
    assert rss() - memory < 5 * MB
    assert len(psutil.Process().memory_maps(grouped=False)) - maps < 20


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Writes a file of `depth` linear layers."""
    path = tmp_path_factory.mktemp("large") / "m.safetensors"

    def file(dtype, depth, width):
        size = torch.empty(0, dtype=dtype).element_size()
        weight = (torch.rand(width * width + width) * 0.01).to(dtype)
        header, end = {}, 0
        for index in range(depth):
            for name, shape in (("weight", [width, width]), ("bias", [width])):
                start, end = end, end + math.prod(shape) * size
                entry = {"dtype": {4: "F32", 2: "BF16"}[size], "shape": shape, "data_offsets": [start, end]}
                header[f"layers.{index}.{name}"] = entry
        text = json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _ in range(depth):
                file.write(weight.view(torch.uint8).numpy().data)
        return path

    return file


@pytest.mark.parametrize(
    ("stored", "dtype", "depth"),
    [(torch.float32, "float32", 9), (torch.bfloat16, "float32", 9)],
    ids=["in place", "cast"],
)
def test_a_file_of_any_size_runs_in_the_memory_of_a_bundle_or_two(large, stored, dtype, depth):
    path = large(stored, depth, 4096)
    script = ROOT / "tests" / "kit" / "processes" / "peak_memory.py"
    done = subprocess.run(
        [sys.executable, script, path, str(depth), "4096", dtype], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["finite"]
    assert result["weights"] > 600 * MB
    assert result["peak"] < 150 * MB
