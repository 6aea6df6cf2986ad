"""INT8 in a model: residency and patches change nothing, and nothing stays behind."""

import gc

import pytest
import torch

from kit.int8 import normal, relative
from kit.nets import Stack, budget, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.ops.int8.weight import Int8Rows
from spillway.patcher.preload import quantise_now

DEPTH = 8
NEAR = 0.1  # the layers of the model amplify an error of the first more than tenfold
DEVICES = {"cpu": lambda: None, "deferred": SimDevice, "overtaking": lambda: SimDevice(eager="some")}


class Linear(torch.nn.Linear):
    """Gives its weight to `linear`, as ComfyUI's layers do."""

    def __init__(self, width):
        super().__init__(width, width)


def build():
    return Stack(DEPTH, layer=Linear)


def every_linear(module, name, weight):
    return Int8Rows() if isinstance(module, torch.nn.Linear) else None


def int8_model(tmp_path, device=None, fraction=None, pins=2.0, dtype=torch.float32, **policy):
    state = write(tmp_path / "m.safetensors", build(), dtype)
    model = dynamic(build, tmp_path / "m.safetensors", dtype, device=device, quantise=every_linear, **policy)
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction), pinned_bytes=budget(model, pins)))
    return model, state


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


def run(model):
    return model(model.module.input())


@pytest.mark.parametrize("pins", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("fraction", [None, 0.6, 0.0])
def test_the_same_bits_at_any_residency(tmp_path, device, fraction, pins):
    model, state = int8_model(tmp_path, device, fraction, pins)
    wanted = run(int8_model(tmp_path, None, None)[0])
    assert relative(wanted, run_plain(state).double()) < NEAR
    assert not same(wanted, run_plain(state))
    for _ in range(3):
        assert same(run(model), wanted)
    if pins == 2.0:
        assert model.ledger.counters.quantised == DEPTH  # once, wherever it stays


def run_plain(state, patches=()):
    module = plain(build, state, torch.float32)
    for key, patch in dict(patches).items():
        parameter = module.get_parameter(key)
        parameter.data = patch(parameter.data)
    return module(module.input())


@pytest.mark.parametrize("fraction", [None, 0.0])
def test_a_finished_form_takes_a_quarter_of_fp32(tmp_path, device, fraction):
    model, state = int8_model(tmp_path, device, fraction)
    run(model)
    run(model)
    assert model.total_bytes < 0.35 * sum(tensor.nbytes for tensor in state.values())
    before = model.ledger.counters.bytes_streamed
    run(model)
    streamed = model.ledger.counters.bytes_streamed - before
    if fraction == 0.0 and not model.backend.in_place:
        assert streamed == model.total_bytes


def test_quantising_ahead(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.5)
    told = []
    assert quantise_now(model, lambda done, total: told.append((done, total))) == DEPTH
    assert told[0] == (0, DEPTH) and told[-1] == (DEPTH, DEPTH)
    assert quantise_now(model) == 0
    run(model)
    assert model.ledger.counters.quantised == DEPTH


def test_quantising_ahead_stops_where_nothing_can_stay(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.0, 0.0)
    assert quantise_now(model) == 1
    assert model.resident_bytes == model.pinned_bytes == 0


def test_quantising_ahead_interrupted(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.5)
    wanted = run(int8_model(tmp_path)[0])

    def progress(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise_now(model, progress)
    assert not any(bundle.loan for bundle in model.bundles)
    assert same(run(model), wanted)
    assert model.ledger.counters.quantised == DEPTH


class Merged:
    """A low-rank change, computed into the weight."""

    def __init__(self, rank=4, width=128):
        self.down, self.up = normal(rank, width, seed=8) * 0.1, normal(width, rank, seed=9) * 0.1

    def __call__(self, weight):
        return weight + self.up @ self.down


class Branch(Merged):
    """The same, beside the weight."""

    def __init__(self):
        super().__init__()
        self.rank = 4

    def low_rank(self, device):
        return self.down.to(device), self.up.to(device)


@pytest.mark.parametrize("kind", [Merged, Branch])
@pytest.mark.parametrize("fraction", [None, 0.5, 0.0])
def test_patches_are_computed_once_and_leave_no_trace(tmp_path, device, fraction, kind):
    model, state = int8_model(tmp_path, device, fraction)
    patches = {f"layers.{index}.weight": kind() for index in range(DEPTH)}
    without = run(model)
    model.set_patches(patches)
    first = run(model)
    made = model.ledger.counters.quantised
    assert same(run(model), first)
    assert same(run(model), first)
    # A branch makes bundles larger: they are laid out anew, once.
    assert model.ledger.counters.quantised == made
    assert relative(first, run_plain(state, patches).double()) < NEAR
    if fraction is None:
        assert all(resident for _, _, resident in model.bundle_report())
    model.set_patches({})
    assert same(run(model), without)


def test_a_branch_is_closer_than_a_merge_that_rounds_badly(tmp_path):
    """One number that dwarfs the rest of its row takes the steps of all others."""

    class Spiked(Merged):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.zeros(128, 4), torch.zeros(4, 128)
            self.up[:, 0], self.down[0, 0] = 2.0, 2.0

    class SpikedBranch(Spiked):
        rank = 4

        def low_rank(self, device):
            return self.down, self.up

    errors = []
    key = "layers.0.weight"
    for kind in (Spiked, SpikedBranch):
        model, state = int8_model(tmp_path)
        model.set_patches({key: kind()})
        x = normal(4, 128)
        wanted = x.double() @ kind()(state[key]).double().t() + state["layers.0.bias"].double()
        errors.append(relative(model.module.layers[0](x), wanted))
    assert errors[1] < errors[0] / 3


def test_a_failing_patch_leaves_the_next_run_right(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.3)
    wanted = run(model)

    def fails(weight):
        raise ValueError("no")

    model.set_patches({"layers.3.weight": fails})
    with pytest.raises(ValueError, match="no"):
        run(model)
    assert not any(bundle.loan for bundle in model.bundles)
    model.set_patches({})
    assert same(run(model), wanted)


def test_nothing_stays_behind(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.5)
    run(model)
    model.close()
    gc.collect()
    assert model.resident_bytes == model.pinned_bytes == 0
    assert type(model.module.layers[0]) is Linear
    assert model.module.layers[0].weight.dtype == torch.float32
