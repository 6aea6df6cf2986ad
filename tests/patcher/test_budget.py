"""Residency under a budget: kept, stable, evenly spread, and following a budget that changes."""

import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from kit.nets import AnyLinear, Stack, budget, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.ops.vbar import software as software_vbar
from spillway.patcher import residency

DEPTH = 24
DEVICES = {"cpu": lambda: None, "device": SimDevice}


def build():
    return Stack(DEPTH, 96)


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "m.safetensors", build(), torch.bfloat16)
    return tmp_path / "m.safetensors"


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


def made(path, device, fraction=None, **policy):
    """A dynamic model in float32, so that a CPU has something to keep too; and the output it should give."""
    model = dynamic(build, path, device=device, **policy)
    if fraction is not None:
        limit(model, fraction)
    return model, plain(build, load_file(path), torch.float32)(model.module.input())


def limit(model, fraction):
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction)))


def run(model):
    return model(model.module.input())


def gains(model):
    before = vars(model.ledger.counters).copy()
    run(model)
    return {name: value - before[name] for name, value in vars(model.ledger.counters).items()}


def longest_run_of_offloaded(model):
    longest = current = 0
    for _, _, resident in model.bundle_report() * 2:  # a step follows a step
        current = 0 if resident else current + 1
        longest = max(longest, current)
    return longest


def test_without_a_budget_everything_stays(path, device):
    model, expected = made(path, device)
    assert same(run(model), expected)
    assert model.resident_bytes == model.peak_resident_bytes == model.total_bytes
    assert gains(model)["bytes_loaded"] == 0


@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.5, 0.25, 0.1, 0.0])
def test_the_peak_stays_within_the_budget(path, device, fraction):
    model, expected = made(path, device, fraction)
    for _ in range(4):
        assert same(run(model), expected)
    assert model.peak_resident_bytes <= budget(model, fraction)


@pytest.mark.parametrize(("fraction", "at_least"), [(1.0, 1.0), (0.75, 0.5), (0.5, 0.25)])
def test_the_budget_is_used(path, device, fraction, at_least):
    model, _ = made(path, device, fraction)
    run(model)
    assert model.resident_bytes >= budget(model, at_least)


@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.5, 0.25, 0.0])
def test_residency_is_stable_from_the_second_step_on(path, device, fraction):
    model, _ = made(path, device, fraction)
    run(model)
    run(model)
    residency, gained = model.bundle_report(), gains(model)
    assert gained["evictions"] == gained["bytes_loaded"] == 0
    for _ in range(3):
        assert gains(model)["bytes_streamed"] == gained["bytes_streamed"]
        assert model.bundle_report() == residency


@pytest.mark.parametrize(("fraction", "longest"), [(0.75, 2), (0.5, 3)])
def test_what_is_offloaded_is_spread_evenly_through_the_step(path, fraction, longest):
    model, _ = made(path, None, fraction)
    run(model)
    assert 0 < longest_run_of_offloaded(model) <= longest


def test_a_model_that_runs_in_another_order_than_it_is_registered_is_laid_out_anew(path, device):
    order = [(index * 7) % DEPTH for index in range(DEPTH)]

    class Shuffled(Stack):
        def forward(self, x):
            for index in order:
                x = torch.tanh(x + self.layers[index](x))
            return x

    def build_shuffled():
        return Shuffled(DEPTH, 96)

    model = dynamic(build_shuffled, path, device=device)
    limit(model, 0.6)
    first = run(model)
    assert all(same(run(model), first) for _ in range(3))
    assert [name for name, _, _ in model.bundle_report()] == [f"layers.{index}" for index in order]
    assert longest_run_of_offloaded(model) <= 4
    assert model.peak_resident_bytes <= budget(model, 0.6)
    assert any("another order" in text for text in model.ledger.decisions)
    assert gains(model)["evictions"] == 0


@pytest.mark.parametrize("fractions", [(0.2, 0.9, 0.3), (None, 0.0, None), (0.6, 0.5, 0.6), (1.0, 0.4, 0.0, 1.0)])
def test_a_changed_budget_is_followed_within_a_step(path, device, fractions):
    model, expected = made(path, device, fractions[0])
    for fraction in fractions * 2:
        limit(model, fraction)
        if fraction is not None:
            assert model.resident_bytes <= budget(model, fraction), "at once"
        for _ in range(2):
            assert same(run(model), expected)
            if fraction is not None:
                assert model.resident_bytes <= budget(model, fraction)
        other, _ = made(path, type(device)() if device else None, fraction)
        run(other)
        assert model.resident_bytes == other.resident_bytes, "as much as a model that never had another budget"
        other.close()


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_a_budget_smaller_than_the_largest_bundle_streams_everything(tmp_path, kind):
    def mixed():
        module = Stack(2, 64)
        module.layers.insert(1, torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Linear(512, 64)))
        return module

    state = write(tmp_path / "m.safetensors", mixed(), torch.bfloat16)
    model = dynamic(mixed, tmp_path / "m.safetensors", device=DEVICES[kind](), vram_bytes=1000)
    expected = plain(mixed, state, torch.float32)(model.module.input())
    for _ in range(3):
        assert same(run(model), expected)
    assert model.resident_bytes == 0
    assert any("smaller than" in text and "largest bundle" in text for text in model.ledger.decisions)


def test_freed_memory_comes_back_with_the_next_step(path, device):
    model, expected = made(path, device)
    run(model)
    wanted = model.total_bytes // 3
    before = model.resident_bytes
    model.residency.caster.free_buffers()  # which may have held what an earlier model left
    assert model.free(wanted) >= wanted
    assert model.resident_bytes <= before - wanted
    assert same(run(model), expected)
    run(model)
    assert model.resident_bytes == before


def test_freeing_everything_leaves_nothing(path, device):
    model, expected = made(path, device)
    run(model)
    assert model.free() > 0
    assert model.resident_bytes == 0
    assert same(run(model), expected)


def test_memory_may_be_freed_from_another_thread_while_the_model_runs(path, device):
    model, expected = made(path, device, 0.8, pinned_bytes=200_000)
    stop, errors, freed = threading.Event(), [], [0]

    def free():
        try:
            while not stop.is_set():
                freed[0] += model.free(100_000) + model.free() + model.free_pins(50_000)
                time.sleep(0.0005)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=free) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        outputs = [run(model) for _ in range(30)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert freed[0] > 0
    assert all(same(output, expected) for output in outputs)
    model.free()
    assert model.resident_bytes == 0
    for _ in range(3):
        assert same(run(model), expected)
    assert model.resident_bytes > 0


def test_memory_that_others_take_is_given_up(path):
    device = SimDevice(capacity=10 << 20)
    model, expected = made(path, device, headroom_bytes=1 << 20)
    run(model)
    assert model.resident_bytes == model.total_bytes
    device.other = (9 << 20) - model.total_bytes // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(software_vbar, "POLL_SECONDS", 0)
        patch.setattr(residency, "GIB", 1 << 12)  # how much more must be free before a model grows
        for _ in range(3):
            assert same(run(model), expected)
            assert device.memory()[0] >= 1 << 20
        assert 0 < model.resident_bytes <= model.total_bytes // 2
        device.other = 0
        for _ in range(3):
            assert same(run(model), expected)
    assert model.resident_bytes == model.total_bytes


def two_models(path, **policy):
    """On a device that has room for one and a half."""
    device = SimDevice(capacity=(2 << 20) - (1 << 17))
    return [made(path, device, headroom_bytes=1 << 19, **fields) for fields in ({}, policy)]


def test_of_two_models_the_one_that_runs_has_the_memory(path, monkeypatch):
    monkeypatch.setattr(software_vbar, "POLL_SECONDS", 0)
    monkeypatch.setattr(residency, "GIB", 1 << 12)
    models = two_models(path)
    for _ in range(2):
        for index in (0, 1):
            (model, expected), (other, _) = models[index], models[1 - index]
            for _ in range(3):
                assert same(run(model), expected)
            assert model.resident_bytes == model.total_bytes
            assert other.resident_bytes < other.total_bytes
            assert model.backend.memory()[0] >= 1 << 19


@pytest.mark.parametrize("policy", [{"keep": "always"}, {"priority": 1}], ids=str)
def test_a_model_of_higher_rank_keeps_its_memory(path, monkeypatch, policy):
    monkeypatch.setattr(software_vbar, "POLL_SECONDS", 0)
    (model, expected), (kept, kept_expected) = two_models(path, **policy)
    assert same(run(kept), kept_expected)
    for _ in range(3):
        assert same(run(model), expected)
        assert kept.resident_bytes == kept.total_bytes
    assert model.resident_bytes < model.total_bytes
    assert model.backend.memory()[0] >= 1 << 19


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefetch", [0, 1, 2, None])
def test_weights_and_transfers_together_stay_within_the_budget(tmp_path, fraction, patched, file_dtype, prefetch):
    """What the device really holds: resident weights, ring buffers, casts."""
    write(tmp_path / "m.safetensors", build(), file_dtype)
    device = SimDevice()
    model, _ = made(tmp_path / "m.safetensors", device, pinned_bytes=0, prefetch=prefetch)
    if patched:
        model.set_patches({f"layers.{index}.weight": torch.neg for index in range(DEPTH)})
    limit(model, fraction)
    for _ in range(3):
        run(model)
    assert device.peak <= budget(model, fraction)
    assert model.resident_bytes > 0


def test_layers_used_twice_do_not_disturb_residency(path, device):
    class Twice(Stack):
        def forward(self, x):
            for _ in range(2):
                for layer in self.layers:
                    x = torch.tanh(layer(x))
            return x

    model = dynamic(lambda: Twice(DEPTH, 96), path, device=device)
    limit(model, 0.6)
    for _ in range(3):
        run(model)
    gained = gains(model)
    assert gained["evictions"] == gained["bytes_loaded"] == 0


def test_a_layer_of_another_size_lies_where_its_cost_puts_it(tmp_path):
    """Small tensors stay, whatever else goes."""

    def mixed():
        module = Stack(8, 128)
        for index in range(1, 8, 2):
            module.layers[index] = torch.nn.LayerNorm(128)
        return module

    write(tmp_path / "m.safetensors", mixed(), torch.bfloat16)
    model = dynamic(mixed, tmp_path / "m.safetensors")
    limit(model, 0.6)
    run(model)
    kinds = {name: type(model.module.get_submodule(name)) for name, _, _ in model.bundle_report()}
    assert all(resident for name, _, resident in model.bundle_report() if not issubclass(kinds[name], AnyLinear))
    assert not all(resident for _, _, resident in model.bundle_report())
