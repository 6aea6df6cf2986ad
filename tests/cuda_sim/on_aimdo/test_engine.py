"""The whole engine on real comfy-aimdo: the plain model's bits, whatever others do with the device's memory."""

import sys
from pathlib import Path

import pytest
import torch

from kit.nets import Blocks, Stack, dynamic, plain, same, write

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from cuda_sim.aimdo import MIB, PAGE
from demo.flux import Flux, FluxConfig
from demo.sampling import make_inputs, sample

ALL = 1 << 40
# About 3 pages of weights in bundles of 1 to 9 MiB: the demo's model, narrower.
CONFIG = FluxConfig(hidden_size=512, depth=2, depth_single=3, context_dim=256, vector_dim=256)


class FluxRun(torch.nn.Module):
    """The demo's model with inputs of its own; a forward is one denoising run."""

    def __init__(self):
        super().__init__()
        self.flux = Flux(CONFIG)

    def forward(self, steps, after_step=None):
        noise, ids, conditioning = make_inputs(CONFIG, size=64, text_tokens=8)
        return sample(
            self.flux, noise, ids, conditioning, device="cpu", dtype=torch.float32, steps=steps, callback=after_step
        )


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    state = write(path, FluxRun())
    return path, plain(FluxRun, {key: tensor * 0.2 for key, tensor in state.items()}, torch.float32)


def big():
    """Four bundles of a page and a bit each."""
    return Stack(4, 2944)


def small():
    """Nine bundles of 4 MiB, so that a page holds eight."""
    return Stack(9, 1024)


def expected(build, state, dtype=torch.float32, patches=()):
    reference = plain(build, state, dtype)
    for key, patch in dict(patches).items():
        parameter = reference.get_parameter(key)
        parameter.data = patch(parameter.data)
    return reference(reference.input())


def resident_pages(model):
    return model.resident_bytes // PAGE


def test_the_demo_model_gives_the_same_bits_while_others_take_and_return_memory(machine, device, flux, tmp_path):
    path, reference = flux
    available = [8, 2, 0, 3, 2, 8]  # for 4 pages of weights
    steps = len(available)
    want = reference(steps)
    model = dynamic(FluxRun, path, device=device, headroom_bytes=16 * MIB)
    model.set_patches({param.key: fifth for bundle in model.bundles for param in bundle.params})
    seen = []

    def others(done, latents):
        seen.append(resident_pages(model))
        machine.leave_pages(available[done % steps])

    machine.leave_pages(available[0])
    got = model(steps, others)
    assert same(got, want)
    assert model.vbar_kind == "aimdo"
    assert all(pages <= room for pages, room in zip(seen, available, strict=True))
    assert seen[0] == seen[-1] == 4 > seen[3] > seen[2] == 0, f"residency does not follow what is free: {seen}"
    counters = model.ledger.counters
    assert counters.hits and counters.misses and counters.bytes_streamed and counters.prefetched
    model.close()


def fifth(weight):
    return weight * 0.2


@pytest.mark.parametrize("pinned_bytes", [0, ALL], ids=["no pins", "pins"])
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_cast_and_patched_weights_under_pressure(machine, device, tmp_path, pinned_bytes, patched):
    path = tmp_path / "m.safetensors"
    state = write(path, small(), torch.bfloat16)
    patches = {"layers.2.weight": torch.neg, "layers.7.bias": fifth} if patched else {}
    want = expected(small, state, patches=patches)
    model = dynamic(small, path, device=device, pinned_bytes=pinned_bytes)
    model.set_patches(patches)
    for pages in (3, 1, 0, 1, 3):
        machine.leave_pages(pages)
        assert same(model(model.module.input()), want)
        assert resident_pages(model) <= pages
    model.close()


def test_bundles_larger_than_a_page(machine, device, tmp_path):
    path = tmp_path / "m.safetensors"
    want = expected(big, write(path, big()))
    model = dynamic(big, path, device=device, pinned_bytes=0)
    for pages in (5, 3, 1, 5):
        machine.leave_pages(pages)
        assert same(model(model.module.input()), want)
        assert resident_pages(model) <= pages
    model.close()


@pytest.mark.parametrize("pages", [None, 0, 1])
def test_a_budget_is_kept_in_whole_pages(machine, device, tmp_path, pages):
    path = tmp_path / "m.safetensors"
    want = expected(small, write(path, small()))
    budget = None if pages is None else pages * PAGE + 20 * MIB
    model = dynamic(small, path, device=device, vram_bytes=budget)
    for _ in range(3):
        assert same(model(model.module.input()), want)
        assert resident_pages(model) <= (2 if pages is None else pages)
    assert model.ledger.counters.misses == 0 or pages is not None
    model.close()


def test_two_models_on_one_device_take_turns(machine, device, tmp_path):
    runs = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.safetensors"
        want = expected(small, write(path, small(), seed=len(runs)))
        runs.append((dynamic(small, path, device=device, headroom_bytes=0), want))
    machine.leave_pages(3)
    for _ in range(3):
        for model, want in runs:
            assert same(model(model.module.input()), want)
            assert resident_pages(model) == 2  # who runs takes what it needs from the other
    for model, _ in runs:
        model.close()


class Hungry(torch.nn.Module):
    """A layer that allocates device memory for its computation, through the functions that comfy-aimdo hooks."""

    driver, nbytes = None, 0

    def __init__(self):
        super().__init__()
        self.inner = Stack(9, 1024)

    def forward(self, x):
        for layer in self.inner.layers:
            held = self.driver.make("cuMemAllocAsync", self.nbytes, None) if self.nbytes else None
            x = torch.tanh(x + layer(x))
            if held:
                self.driver.call("cuMemFreeAsync", held, None)
        return x

    def input(self):
        return self.inner.input()


def test_allocations_of_the_computation_push_weights_out(machine, device, tmp_path):
    path = tmp_path / "m.safetensors"
    state = write(path, Hungry())
    Hungry.driver, Hungry.nbytes = machine.driver, 0
    want = expected(Hungry, state)
    machine.leave_pages(6)
    model = dynamic(Hungry, path, device=device, headroom_bytes=0)
    assert same(model(model.module.input()), want)
    assert resident_pages(model) == 2
    Hungry.nbytes = 5 * PAGE
    for _ in range(2):
        assert same(model(model.module.input()), want)
    assert model.ledger.counters.misses
    model.close()


def test_freeing_between_steps_and_going_on(machine, device, tmp_path):
    path = tmp_path / "m.safetensors"
    want = expected(Blocks, write(path, Blocks()))
    model = dynamic(Blocks, path, device=device)
    for _ in range(3):
        assert same(model(model.module.input()), want)
        assert model.free() and model.resident_bytes == 0
    model.release()
    assert same(model(model.module.input()), want)
    model.close()
