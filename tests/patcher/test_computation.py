"""Weights beside a computation: what it is said to need stays free, and steps begin wherever a model is entered."""

import pytest
import torch

from kit.nets import AnyLinear, Stack, dynamic, same, write
from kit.sim_device import SimDevice
from spillway.ops.vbar import software as software_vbar
from spillway.patcher import residency
from spillway.patcher.policy import Rule

MIB = 1 << 20
WIDTH = 256  # 257 KiB a layer
DEPTH = 24


class Card(SimDevice):
    """Counts what really is there, and refuses what is not."""

    def empty(self, nbytes):
        if nbytes > self.memory()[0]:
            raise torch.OutOfMemoryError("simulated: out of memory")
        return super().empty(nbytes)

    def memory(self):
        return max(0, self.capacity - self.other - self.held()), self.capacity


class Hungry(Stack):
    """Computes `needs` bytes of activations half way, outside of every layer."""

    device, needs = None, 0

    def __init__(self):
        super().__init__(DEPTH, WIDTH)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            if index == DEPTH // 2 and self.needs:
                activations = self.device.empty(self.needs)
                self.free_then = self.device.memory()[0]
                del activations
            x = torch.tanh(x + layer(x))
        return x


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No look at the free memory is kept, and small amounts count."""
    monkeypatch.setattr(software_vbar, "POLL_SECONDS", 0)
    monkeypatch.setattr(residency, "GIB", 1 << 14)
    monkeypatch.setattr(residency, "FLOOR", 1 << 14)


def made(tmp_path, device, build=Hungry, seed=0, **policy):
    path = tmp_path / f"{seed}.safetensors"
    write(path, build(), seed=seed)
    model = dynamic(build, path, device=device, headroom_bytes=MIB // 4, pinned_bytes=0, **policy)
    model.module.device = device
    return model


def run(model):
    return model(model.module.input())


def test_free_memory_that_no_weight_may_take_is_no_reason_for_another_plan(tmp_path):
    """What a rule streams always is not brought closer by more free memory, and the log says so once."""
    device = Card(32 * MIB)
    model = made(tmp_path, device, rules=(Rule("layers.1?", resident=False),))
    for other in (4, 3, 2, 1, 0):
        device.other = other * MIB
        run(model)
    (said,) = (text for text in model.ledger.decisions if text.startswith("offloaded"))
    assert said.startswith(f"offloaded 10 of {DEPTH} bundles")
    device.other = 29 * MIB  # what is gone is another matter
    run(model)
    assert model.resident_bytes < 3 * MIB


@pytest.mark.parametrize("budget", [None, 100 * MIB], ids=["free", "budget"])
@pytest.mark.parametrize("loaded_before", [False, True])
def test_what_the_computation_is_said_to_need_is_there_at_every_step(tmp_path, budget, loaded_before):
    expected = run(made(tmp_path, None))
    device = Card(7 * MIB)
    model = made(tmp_path, device, vram_bytes=budget)
    if loaded_before:  # the weights fill the card
        run(model)
        assert device.memory()[0] < 3 * MIB
    model.module.needs = 3 * MIB
    model.expect_use(3 * MIB + MIB // 4)
    for _ in range(4):
        before = model.ledger.counters.bytes_loaded
        assert same(run(model), expected)
        assert model.module.free_then >= 0
        last = model.ledger.counters.bytes_loaded - before
    assert last == 0, "nothing goes and comes back at every step"
    assert model.resident_bytes > 2 * MIB, "what is left is used"
    model.module.needs = 0
    model.expect_use(0)
    run(model)
    run(model)
    assert model.resident_bytes > 5 * MIB, "the next load decides anew"


def test_another_model_gives_way_to_the_computation(tmp_path):
    """As a VAE decode beside a model that fills the card."""
    device = Card(9 * MIB)
    large, small = made(tmp_path, device), made(tmp_path, device, seed=1)
    run(large)
    held = large.resident_bytes
    assert held > 5 * MIB
    small.module.needs = 5 * MIB
    small.set_policy(small.policy.with_changes(vram_bytes=3 * MIB))
    for _ in range(2):
        small.expect_use(5 * MIB + MIB // 4)
        run(small)
        assert large.resident_bytes < held
    assert small.resident_bytes > 0


def test_the_ledger_says_what_is_kept_for_the_computation(tmp_path):
    device = Card(7 * MIB)
    model = made(tmp_path, device)
    model.expect_use(3 * MIB)
    run(model)
    words = model.ledger.decisions[-1]
    assert "3.0 MiB for the computation" in words
    offloaded = sum(not resident for _, _, resident in model.bundle_report())
    assert f"offloaded {offloaded} of {DEPTH}" in words


def test_a_computation_that_takes_more_than_was_said_is_learnt_from(tmp_path):
    device = Card(7 * MIB)
    model = made(tmp_path, device)
    model.module.needs = 3 * MIB
    model.expect_use(2 * MIB)
    failures = []
    for _ in range(6):
        try:
            run(model)
        except torch.OutOfMemoryError:
            failures.append(len(failures))
    assert len(failures) <= 3
    before = model.ledger.counters.bytes_loaded
    run(model)
    assert model.ledger.counters.bytes_loaded == before and model.resident_bytes > MIB


@pytest.mark.parametrize(("headroom", "kept"), [(None, 2.5), (1, 2.5), (3, 3)])
def test_what_an_equal_computation_took_is_left_free_instead_of_a_guess(tmp_path, monkeypatch, headroom, kept):
    """Also where the policy names a headroom, which is then the least."""
    monkeypatch.setattr("spillway.patcher.headroom.SPARE", MIB // 2)
    monkeypatch.setattr("spillway.patcher.headroom.ROUND", MIB // 4)
    device = Card(7 * MIB)
    model = made(tmp_path, device)
    model.set_policy(model.policy.with_changes(headroom_bytes=None if headroom is None else headroom * MIB))
    model.module.needs = 2 * MIB - MIB // 8
    model.expect_use(5 * MIB)
    run(model)
    guessed = model.resident_bytes
    model.expect_use(5 * MIB, 2 * MIB - MIB // 8)
    for _ in range(3):
        run(model)
    assert guessed < 2 * MIB and model.kept_free == kept * MIB
    assert 5.4 * MIB - kept * MIB < model.resident_bytes <= 7 * MIB - kept * MIB
    assert any("which took 1.9 MiB in an earlier run" in words for words in model.ledger.decisions)
    assert model.free_for_computation() >= 5 * MIB, "what ComfyUI was promised holds: weights would give way"
    model.expect_use(5 * MIB)
    run(model)
    assert model.resident_bytes <= guessed, "of another size nothing is known"


def test_a_host_is_not_held_to_it(tmp_path):
    """On a CPU the figure is one of other memory."""
    model = made(tmp_path, None)
    model.expect_use(1 << 60)
    run(model)
    assert model.resident_bytes == model.total_bytes


# Steps


class Coder(torch.nn.Module):
    """Two ways in, as a VAE has, or a vision tower and its language model."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stack(4, 128), Stack(12, 128)

    def forward(self, x):
        return self.encoder(x) if self.encodes else self.decoder(x)

    encodes = True

    def input(self):
        return self.encoder.input()


def pressed(tmp_path, device):
    """A model that was encoding while others held the memory, and is about to decode."""
    model = made(tmp_path, device, Coder)
    run(model)
    model.module.encodes = False
    device.other = device.capacity - MIB // 2  # room for buffers
    run(model)
    model.free()
    run(model)
    device.other = 0
    return model


WAYS_IN = {
    "call": lambda model: run(model),
    "load": lambda model: (model.expect_use(), model.module(model.module.input())),
    # Each token of a text is a pass of its own, within one call of the model.
    "again and again": lambda model: [model.module(model.module.input()) for _ in range(3)],
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_step_begins_wherever_a_model_is_entered(tmp_path, way):
    device = Card(4 * MIB)
    model = pressed(tmp_path, device)
    assert model.resident_bytes == 0
    WAYS_IN[way](model)
    decoder = [resident for name, _, resident in model.bundle_report() if name.startswith("decoder")]
    assert sum(decoder) >= 11 if way != "again and again" else sum(decoder) >= 6


def test_a_step_begins_once_in_a_forward_that_runs_each_layer_once(tmp_path):
    model = made(tmp_path, Card(64 * MIB), lambda: Stack(5, 64))
    for steps in range(1, 5):
        run(model)
        assert model.ledger.counters.steps == steps


def test_loading_ranks_a_model_first(tmp_path):
    device = Card(64 * MIB)
    one, two = made(tmp_path, device), made(tmp_path, device, seed=1)
    run(one), run(two)
    assert one.residency.vbar.rank < two.residency.vbar.rank
    one.expect_use()
    assert one.residency.vbar.rank > two.residency.vbar.rank


def test_layers_that_are_lent_stay_right_where_a_step_begins_below_them(tmp_path):
    """A module with weights of its own around others, which run more than once."""

    class Outer(AnyLinear):
        def __init__(self):
            super().__init__(64)
            self.inner = torch.nn.ModuleList(AnyLinear(64) for _ in range(3))

        def forward(self, x):
            for _ in range(3):
                for layer in self.inner:
                    x = torch.tanh(layer(x))
            return super().forward(x)

        def input(self):
            return torch.linspace(-1, 1, 128).view(2, 64)

    model = made(tmp_path, Card(64 * MIB), Outer, vram_bytes=40_000)
    expected = run(model)
    for _ in range(4):
        assert same(run(model), expected)
