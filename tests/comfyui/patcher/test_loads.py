"""What ComfyUI expects of a load decides how much of a card the weights take."""

import asyncio
import gc
import sys
import types

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import pytest
import torch

from fake_device.device import start, wanted
from kit.comfyui import sampling
from kit.comfyui.on_device import wants_aimdo
from kit.comfyui.pairs import SMALL, assert_same, pair, run
from kit.device import is_real
from kit.sim_device import SimDevice
from spillway.ops.vbar import software as software_vbar
from spillway.patcher import residency
from spillway.patcher.comfyui import loads, model_state
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

MIB = 1 << 20
LATENT = sampling.latent(16, 32, 32)


class Card(SimDevice):
    """Memory of its own, under the CPU's name, with as much free as nobody holds."""

    def memory(self):
        return max(0, self.capacity - self.other - self.held()), self.capacity


class FakeCard:
    """The fake device, as if nothing that it holds already were there."""

    def __init__(self, capacity):
        self.device = start()
        self.device.reset()
        self.device.drop_cached()
        self.device.set(others=0)
        self.before = self.device.held()
        self.capacity = capacity

    @property
    def capacity(self):
        return self.device.get("capacity") - self.before

    @capacity.setter
    def capacity(self, nbytes):
        self.device.set(capacity=self.before + nbytes)

    @property
    def other(self):
        return self.device.get("others")

    @other.setter
    def other(self, nbytes):
        self.device.set(others=nbytes)

    def memory(self):
        self.device.drop_cached()
        return torch.cuda.mem_get_info()[0], self.capacity


@pytest.fixture
def card(monkeypatch):
    """Every engine of the test is on one card; ComfyUI's minimum is small."""
    if wants_aimdo():
        pytest.skip("comfy-aimdo maps pages of 32 MiB, more than this card has")
    if is_real():
        pytest.skip("the memory of a real card is not the test's to set; the fake one runs this")
    if wanted():
        mm.unload_all_models()
        gc.collect()
        device = FakeCard(8 * MIB)
    else:
        device = Card(8 * MIB)
        monkeypatch.setattr(model_state, "backend_for", lambda *_: device)
    monkeypatch.setattr(mm, "minimum_inference_memory", lambda: MIB // 2)
    monkeypatch.setattr(mm, "extra_reserved_memory", lambda: MIB // 4)
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: MIB // 2)
    monkeypatch.setattr(software_vbar, "POLL_SECONDS", 0)
    monkeypatch.setattr(residency, "GIB", 1 << 14)
    monkeypatch.setattr(residency, "FLOOR", 1 << 14)
    yield device
    if wanted():
        start()


simulated = pytest.mark.skipif(
    wanted(),
    reason="the memory of this card is a figure; one that really fills up is that of device/test_full_device.py",
)
POLICY = Policy(headroom_bytes=MIB // 4, pinned_bytes=0)


@pytest.fixture
def flux(checkpoint):
    return checkpoint("flux", **SMALL)


def load(path):
    return comfy_load.load_diffusion_model(path, "default", POLICY)


def test_the_estimate_of_a_load_is_kept_free_through_the_steps(card, flux, monkeypatch):
    model, wanted = load(flux), run(load(flux), steps=4)
    monkeypatch.setattr(type(model.model), "memory_required", lambda *_, **__: 5 * MIB)
    free, step = [], []
    got = run(model, steps=4, callback=lambda *_: free.append(card.memory()[0]) or step.append(counted(model)))
    assert_same(got, wanted)
    assert all(nbytes >= 5 * MIB for nbytes in free)
    assert 0 < model.dynamic.resident_bytes < model.dynamic.total_bytes
    assert step[2] - step[1] == step[3] - step[2], "no weight goes and comes back"
    assert "for the computation" in " ".join(model.ledger.decisions)


def counted(model):
    return model.ledger.counters.bytes_loaded


@simulated
def test_a_vae_beside_a_model_that_fills_the_card_gets_what_it_needs(card, flux, checkpoint, monkeypatch):
    model, vae = load(flux), comfy_load.load_vae(checkpoint("flux_vae"), POLICY)
    run(model)
    held = model.dynamic.resident_bytes
    assert held, model.ledger.decisions
    card.other = card.memory()[0]  # the card is full
    monkeypatch.setattr(vae, "memory_used_decode", lambda *_: MIB)
    free = []
    last = vae.first_stage_model.decoder.norm_out
    last.register_forward_pre_hook(lambda *_: free.append(card.memory()[0]))
    vae.decode(LATENT)
    assert model.dynamic.resident_bytes < held
    assert free and min(free) >= MIB


@pytest.mark.parametrize("room", [pytest.param(3, marks=simulated), 8])
def test_conditions_are_batched_at_every_step_or_at_none(card, flux, monkeypatch, room):
    """Each step sees what the first one saw, before any weight had come."""
    card.capacity = room * MIB
    model = load(flux)
    monkeypatch.setattr(type(model.model), "memory_required", lambda _, shape, **__: shape[0] * 0.6 * MIB)
    batches = []
    apply = model.model.apply_model
    model.model.apply_model = lambda x, *args, **kwargs: batches.append(len(x)) or apply(x, *args, **kwargs)
    run(model, steps=4, cfg=3.0)
    assert set(batches) == {2}
    assert len(batches) == 4
    assert model.dynamic.resident_bytes + 1.2 * MIB <= card.capacity


def test_more_than_was_promised_is_not_batched(card, flux, monkeypatch):
    """Free memory that weights are yet to take is none."""
    model = load(flux)
    mm.load_models_gpu([model], memory_required=MIB, minimum_memory_required=MIB / 2)
    before = model.get_free_memory(model.load_device)
    run(model)
    after = model.get_free_memory(model.load_device)
    card.capacity = 4 * MIB
    assert before <= 8 * MIB - model.dynamic.total_bytes
    assert after <= 8 * MIB - model.dynamic.resident_bytes


def test_a_dynamic_model_of_comfyuis_own_finds_room(card, flux):
    """ComfyUI takes nothing from one dynamic model for another."""
    model = load(flux)
    run(model)
    card.other = card.memory()[0]
    held = model.dynamic.resident_bytes
    other = types.SimpleNamespace(model=None, load_device=model.load_device)
    other.is_dynamic, other.model_size, other.loaded_size = lambda: True, lambda: MIB, lambda: 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm, "get_free_memory", lambda *_: card.memory()[0])
        loads._make_room([other], MIB // 2)
    assert held - model.dynamic.resident_bytes >= MIB


def test_a_load_by_another_way_is_shrunk_for_good(card, flux):
    model = load(flux)
    run(model)
    held = model.loaded_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm, "get_free_memory", lambda *_: card.memory()[0])
        model.partially_load(model.load_device, -(held // 2))
    shrunk = model.loaded_size()
    assert shrunk <= held - held // 2
    for _ in range(2):
        model.model.diffusion_model(*inputs(model))
        assert model.dynamic.resident_bytes <= held - held // 2


def inputs(model):
    width, pooled = sampling.widths(model)
    x = torch.zeros(1, model.model.latent_format.latent_channels, 4, 4)
    guidance = torch.ones(1)
    return x, torch.ones(1), torch.zeros(1, 8, width), torch.zeros(1, pooled), guidance


def test_a_device_that_sees_allocations_is_not_shrunk(flux, monkeypatch):
    _, ours = pair(flux, 1.0)
    run(ours)
    held = ours.loaded_size()
    monkeypatch.setattr(type(ours.dynamic), "sees_allocations", True)
    assert ours.partially_load(ours.load_device, -(held // 2)) == 0
    assert ours.loaded_size() == held


def test_loading_takes_the_first_place(card, flux):
    one, two = load(flux), load(flux)
    run(one), run(two)
    mm.load_models_gpu([one])
    assert one.dynamic.residency.vbar.rank > two.dynamic.residency.vbar.rank


def test_buffers_go_when_sampling_ends(card, flux):
    model = comfy_load.load_diffusion_model(flux, "default", POLICY.with_changes(vram_bytes=0))
    used = []
    run(model, callback=lambda *_: used.append(model.loaded_size()))
    assert min(used) > 0
    assert model.dynamic.buffer_bytes == 0
    assert model.loaded_size() == model.dynamic.placed_bytes, "the module's own buffers, on a device of its own"


# Free after use

SAYS = hasattr(comfy.model_patcher.ModelPatcherDynamic, "set_in_use_by_current_prompt")


@pytest.fixture
def silent(monkeypatch):
    """A ComfyUI that does not say when a prompt ends."""
    monkeypatch.delattr(comfy.model_patcher.ModelPatcherDynamic, "set_in_use_by_current_prompt", raising=False)
    assert not loads.is_tracked()


@pytest.fixture
def vae(checkpoint):
    return comfy_load.load_vae(checkpoint("flux_vae"), Policy(keep="free after use"))


def test_where_comfyui_is_silent_a_use_ends_with_the_load_of_another_model(silent, vae, flux):
    vae.decode(LATENT)
    vae.decode(LATENT)
    assert vae.patcher.dynamic.residency is not None
    mm.load_models_gpu([vae.patcher])
    assert vae.patcher.dynamic.residency is not None
    mm.load_models_gpu([load(flux)])
    assert vae.patcher.dynamic.residency is None


def test_where_comfyui_is_silent_a_use_ends_with_the_prompt(silent, vae, monkeypatch):
    class PromptExecutor:
        def execute(self, fails):
            vae.decode(LATENT)
            if fails:
                raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "execution", types.SimpleNamespace(PromptExecutor=PromptExecutor))
    loads.install_prompt_end()
    loads.install_prompt_end()
    PromptExecutor().execute(False)
    assert vae.patcher.dynamic.residency is None
    with pytest.raises(KeyboardInterrupt):
        PromptExecutor().execute(True)
    assert vae.patcher.dynamic.residency is None


def test_a_model_that_runs_is_not_released(silent, vae, flux):
    other = load(flux)
    decoder = vae.first_stage_model.decoder.conv_in
    decoder.register_forward_pre_hook(lambda *_: mm.load_models_gpu([other]))
    bundle = vae.patcher.dynamic.by_key["decoder.conv_in.weight"]
    with vae.patcher.dynamic.prepare().caster.borrow(bundle):
        loads.release_after_use()
        assert vae.patcher.dynamic.residency is not None
    loads.release_after_use()
    assert vae.patcher.dynamic.residency is None


@pytest.mark.skipif(not SAYS, reason="this ComfyUI does not say when a prompt ends")
def test_where_comfyui_says_so_nothing_else_does(vae, flux):
    assert loads.is_tracked()
    vae.decode(LATENT)
    mm.load_models_gpu([load(flux)])
    assert vae.patcher.dynamic.residency is not None
    assert asyncio.iscoroutinefunction(comfy.model_patcher.ModelPatcher.clone) is False


def test_the_listener_is_in_place_once():
    before = mm.load_models_gpu
    loads.install()
    assert mm.load_models_gpu is before and hasattr(before, "spillway_original")
