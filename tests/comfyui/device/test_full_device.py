"""A device that fills up: whatever gives way, the pictures are those of ComfyUI's own loaders on the same device."""

import gc
import time

import comfy.model_base
import comfy.model_management as mm
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.dynamic_vram import PIECE, software
from kit.comfyui.loras import forms, with_lora
from kit.comfyui.pairs import assert_same, comfyui_vae, run
from spillway.nodes.vae import SpillwayVAEDecode
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

CUDA = torch.device("cuda", 0)
MIB = 1 << 20
EAGER = Policy(headroom_bytes=0)  # takes whatever is free


@pytest.fixture
def asked(monkeypatch):
    """What ComfyUI passes to each partially_load."""
    asked, real = [], mm.LoadedModel.model_use_more_vram

    def use_more(loaded, extra_memory, *args, **kwargs):
        asked.append(extra_memory)
        return real(loaded, extra_memory, *args, **kwargs)

    monkeypatch.setattr(mm.LoadedModel, "model_use_more_vram", use_more)
    return asked


def batches(model, monkeypatch, **options):
    """Latents, and how many conditions went into one call."""
    seen, real = set(), model.model.apply_model

    def apply_model(x, *args, **kwargs):
        seen.add(len(x))
        return real(x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "apply_model", apply_model)
        return run(model, **options), seen


def held(card):
    mm.unload_all_models()
    gc.collect()
    card.drop_cached()
    return card.memory("used"), card.get("mapped")


@software
def test_a_model_is_asked_for_negative_memory_and_shrinks(card, flux, asked):
    """On a full card each later load has less memory than the model holds."""
    wanted = run(comfy.sd.load_diffusion_model(flux))
    mm.unload_all_models()
    ours = comfy_load.load_diffusion_model(flux, policy=EAGER)
    lora = with_lora(ours, forms("lora"))
    assert_same(run(ours), wanted)
    held = ours.loaded_size()
    assert held > 0
    with card.room(64 * MIB):
        asked.clear()
        patched = run(lora)
        assert min(asked) < 0
        assert_same(run(ours), wanted)
        assert_same(run(lora), patched)
    assert min(asked) < 0 and not torch.equal(patched, wanted)


@software
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_free_memory_gives_so_much_back_to_the_device(card, flux, share):
    wanted = run(comfy.sd.load_diffusion_model(flux))
    mm.unload_all_models()
    ours = comfy_load.load_diffusion_model(flux, policy=EAGER)
    assert_same(run(ours), wanted)
    held, used = ours.loaded_size(), card.memory("used")
    assert held > 0
    short = int(share * held)
    mm.free_memory(mm.get_free_memory(CUDA) + short, CUDA)
    assert used - card.memory("used") >= short
    assert ours.loaded_size() <= held - short
    assert_same(run(ours), wanted)


@software
def test_two_models_that_do_not_fit_together_take_turns(card, checkpoint):
    paths = [checkpoint("flux"), checkpoint("wan")]
    wanted, sizes = [], []
    for path in paths:
        model = comfy.sd.load_diffusion_model(path)
        wanted.append(run(model))
        sizes.append(model.model_size())
        del model
    mm.unload_all_models()
    models = [comfy_load.load_diffusion_model(path, policy=EAGER) for path in paths]
    with card.room(max(sizes) + min(sizes) // 2 + 16 * MIB):
        for _ in range(3):
            for model, latents in zip(models, wanted, strict=True):
                assert_same(run(model), latents)
                assert model.loaded_size() > 0
    assert card.get("allocated") <= card.get("capacity")


@pytest.mark.parametrize("node", [False, True], ids=["ComfyUI's", "Spillway's node"])
def test_a_vae_decodes_beside_a_full_model(card, checkpoint, node):
    """The model holds what is free, and gives way to the picture."""
    vae_path, path = checkpoint("flux_vae"), checkpoint("flux")
    latent = sampling.latent(16, 64, 64)
    core = comfyui_vae(vae_path)
    before = card.memory("used")
    card.library.fake_reset_peak(0)
    picture = core.decode(latent)
    needs = card.memory("peak") - before
    wanted = run(comfy.sd.load_diffusion_model(path))
    del core
    mm.unload_all_models()
    model, vae = comfy_load.load_diffusion_model(path, policy=EAGER), comfy_load.load_vae(vae_path, EAGER)
    deadline = time.monotonic() + 10
    assert_same(run(model), wanted)
    while model.loaded_size() < PIECE and time.monotonic() < deadline:  # comfy-aimdo looks now and then at what is free
        assert_same(run(model), wanted)
    assert model.loaded_size() >= PIECE
    with card.room(needs - model.loaded_size() // 2):
        for _ in range(2):
            if node:
                got, how = SpillwayVAEDecode.execute({"samples": latent}, vae, 512).result
                assert how.startswith("plain")
            else:
                got = vae.decode(latent)
            assert_same(got.reshape(picture.shape), picture)
            assert_same(run(model), wanted)


def test_both_conditions_go_in_one_batch_where_there_is_room(card, checkpoint, monkeypatch):
    """ComfyUI asks at each step whether its estimate fits what is free."""
    path = checkpoint("sd15_unet", mult=(1,))
    cond = sampling.conds("sd15")
    results = []
    for load in (comfy.sd.load_diffusion_model, comfy_load.load_diffusion_model):
        mm.unload_all_models()
        results.append(batches(load(path), monkeypatch, cond=cond))
    assert results[0][1] == results[1][1] == {2}
    assert_same(results[1][0], results[0][0])


@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "in one batch"])
def test_conditions_are_batched_where_the_estimate_of_both_fits(card, checkpoint, monkeypatch, batched):
    """That of one fits what is free in any case. The estimates are far more than a page of comfy-aimdo's."""
    path = checkpoint("sd15_unet", mult=(1,))
    models = [load(path) for load in (comfy.sd.load_diffusion_model, comfy_load.load_diffusion_model)]
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda _, shape, **__: shape[0] * 512 * MIB)
    cond = sampling.conds("sd15")
    one, both, whole = 1.5 * 512 * MIB, 1.5 * 1024 * MIB, 64 * MIB + mm.extra_reserved_memory()
    results = []
    for model in models:
        mm.unload_all_models()
        with card.room(int(both + 2 * whole if batched else (one + both) // 2)):
            results.append(batches(model, monkeypatch, steps=2, cond=cond, width=128, height=128))
    assert results[0][1] == results[1][1] == {2 if batched else 1}
    assert_same(results[1][0], results[0][0])


def test_a_prompt_without_any_memory_ends_with_a_clear_error(card, flux):
    """The next one is right, and nothing is left of either."""
    wanted = run(comfy.sd.load_diffusion_model(flux))
    mm.unload_all_models()
    ours = comfy_load.load_diffusion_model(flux, policy=EAGER)
    assert_same(run(ours), wanted)
    used, mapped = held(card)
    for _ in range(2):
        # What comfy-aimdo has mapped for models that are gone gives way, and is gone for good.
        with card.room(-card.get("mapped")), pytest.raises(RuntimeError, match="out of memory"):
            run(ours)
        for _ in range(2):
            left, still_mapped = held(card)
            assert left == used and still_mapped <= mapped
            assert_same(run(ours), wanted)
