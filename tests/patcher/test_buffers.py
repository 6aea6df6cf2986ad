"""Buffers that bundles pass through: within the budget at any setting, counted, and given back like weights."""

import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kit.nets import AnyLinear, Stack, dynamic, plain, same, steady, write
from kit.sim_device import SimDevice
from spillway.patcher.residency import STAGED

ALL = 1 << 40


class Layers(Stack):
    """Layers of any widths, each with an input of its own."""

    def __init__(self, widths):
        torch.nn.Module.__init__(self)
        self.widths = widths
        self.layers = torch.nn.ModuleList(AnyLinear(width) for width in widths)

    def forward(self, x):
        return sum(layer(x[:, : layer.bias.numel()]).sum() for layer in self.layers)

    def input(self):
        return torch.linspace(-1, 1, 2 * max(self.widths)).view(2, -1)


def made(tmp_path, widths, stored=torch.float32, dtype=torch.float32, device=None, **policy):
    path = tmp_path / "m.safetensors"
    state = write(path, Layers(widths), stored)
    device = device or SimDevice()
    model = dynamic(lambda: Layers(widths), path, dtype, device=device, **policy)
    reference = plain(lambda: Layers(widths), state, dtype)
    return model, device, reference(reference.input())


def run(model):
    return model(model.module.input())


def largest_use(model):
    return max(model.cost(bundle) for bundle in model.bundles)


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@steady
@given(
    widths=st.lists(st.sampled_from([8, 24, 64, 65, 96, 160]), min_size=1, max_size=9),
    fraction=st.floats(0.01, 1.2),
    prefetch=st.integers(0, 5),
    streams=st.integers(0, 3),
    device_streams=st.integers(0, 2),
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES[:2]),
    patched=st.integers(0, 2),
    pinned=st.sampled_from([0, 40_000, ALL]),
)
# One large bundle among small ones, at default settings.
@example([160, 8, 24, 24, 24, 24, 24], 0.95, 2, 2, 2, torch.float32, torch.float32, 0, 0)
@example([160, 96, 96, 160], 1.125, 0, 0, 0, torch.float32, torch.float32, 2, 0)
@example([8, 8], 1.046875, 1, 1, 1, torch.float32, torch.float32, 1, 40_000)
@example([64] * 8, 0.6, 2, 2, 2, torch.bfloat16, torch.float32, 1, ALL)
def test_the_device_never_holds_more_than_the_budget(
    tmp_path, widths, fraction, prefetch, streams, device_streams, stored, dtype, patched, pinned
):
    """Weights, buffers and final forms together, in whatever order transfers end. Casts of an op are not seen here.

    A budget that is smaller than one bundle's use is documented to peak at that use.
    """
    device = SimDevice(streams=device_streams, eager=random.Random(fraction).choice([True, False, "some"]))
    policy = {"prefetch": prefetch, "streams": streams, "pinned_bytes": pinned}
    model, device, expected = made(tmp_path, widths, stored, dtype, device, **policy)
    if patched:
        # Twice in place, so that the numbers are the same.
        model.set_patches({f"layers.{i}.weight": lambda w: w.neg_().neg_() for i in range(0, len(widths), patched)})
    budget = max(1, int(fraction * model.total_bytes))
    model.set_policy(model.policy.with_changes(vram_bytes=budget))
    allowed = max(budget, largest_use(model))
    for _ in range(3):
        assert same(run(model), expected)
        assert device.peak <= allowed
        assert device.held() <= model.resident_bytes + model.buffer_bytes, "every byte is counted"
    assert device.peak <= model.peak_bytes
    model.close()
    assert device.held() == 0


def test_one_large_bundle_does_not_grow_every_buffer(tmp_path):
    """A text encoder has an embedding of 2 GB and layers of 16 MB."""
    widths = [512, *[32] * 30]
    model, device, expected = made(tmp_path, widths, pinned_bytes=0, vram_bytes=0)
    large, small = model.bundles[0].nbytes, model.bundles[1].nbytes
    for _ in range(6):
        assert same(run(model), expected)
        assert device.peak <= large + 3 * small
        assert model.staging_bytes <= large + (STAGED - 1) * small
    with_room = made(tmp_path, widths, pinned_bytes=0, vram_bytes=large + 14 * small)[0]
    run(with_room)
    run(with_room)
    assert sum(resident for _, _, resident in with_room.bundle_report()) >= 9


WAYS = {
    "free": lambda model: model.free(),
    "free some": lambda model: model.free(1),
    "release": lambda model: model.release(),
    "close": lambda model: model.close(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_buffers_go_with_the_weights(tmp_path, way, prefetch):
    model, device, expected = made(tmp_path, [96] * 6, torch.bfloat16, pinned_bytes=0, prefetch=prefetch)
    model.set_policy(model.policy.with_changes(vram_bytes=model.total_bytes * 3 // 4))
    assert same(run(model), expected) and same(run(model), expected)
    before = model.buffer_bytes
    assert before > 0 and model.staging_bytes > 0
    held = device.held()
    freed = WAYS[way](model)
    assert model.buffer_bytes == model.staging_bytes == 0
    assert device.held() == model.resident_bytes
    if freed is not None:
        assert freed == held - device.held()
    if way != "close":
        assert same(run(model), expected)


def test_a_model_that_has_come_to_stay_holds_no_buffers(tmp_path):
    model, device, expected = made(tmp_path, [96] * 6, torch.bfloat16, pinned_bytes=0)
    assert same(run(model), expected)
    assert device.held() == model.resident_bytes == model.total_bytes
    assert model.buffer_bytes == model.staging_bytes == 0 < model.peak_bytes - model.peak_resident_bytes


def test_bundles_that_never_stay_have_their_buffers_reserved(tmp_path):
    from spillway.patcher.policy import Rule

    device = SimDevice()
    rules = (Rule("layers.0", resident=False), Rule("layers.3", resident=False))
    model, device, expected = made(tmp_path, [96] * 6, device=device, pinned_bytes=0, rules=rules)
    budget = model.total_bytes - 1000
    model.set_policy(model.policy.with_changes(vram_bytes=budget))
    for _ in range(3):
        assert same(run(model), expected)
    assert device.peak <= budget
