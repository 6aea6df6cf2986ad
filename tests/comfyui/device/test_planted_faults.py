"""Faults that a CPU forgives, planted one at a time: on this device each gives a wrong picture, an error or a hazard.

What is planted is the source of one function with a few words changed. A fault that nothing sees would mean that these
tests could not fail for it either.
"""

import gc
import importlib
import inspect
import sys
import textwrap

import comfy.model_management as mm
import comfy.sd
import pytest
import torch

from kit.comfyui.loras import forms, with_lora
from kit.comfyui.pairs import assert_same, comfyui_vae, run
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

HALF = Policy(vram_bytes=1 << 20, headroom_bytes=0)


def plant(monkeypatch, where, words, others):
    """Let a function have other words. where: module:name or module:Class.name, in the pack."""
    module = importlib.import_module(f"spillway.{where.partition(':')[0]}")
    *classes, name = where.partition(":")[2].split(".")
    owner = getattr(module, classes[0]) if classes else module
    real = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(real))
    assert words in source, f"{where} no longer says {words!r}"
    namespace = {"super": lambda: super(owner, inspect.currentframe().f_back.f_locals["self"])} if classes else {}
    scope = {**vars(module), **namespace}
    exec("from __future__ import annotations\n" + source.replace(words, others, 1), scope)
    monkeypatch.setattr(owner, name, scope[name])
    if not classes:  # modules that imported the function by its name
        for user in [user for key, user in sys.modules.items() if key.startswith("spillway.")]:
            if vars(user).get(name) is real:
                monkeypatch.setattr(user, name, scope[name])


def sampled(checkpoint):
    """Weights that stay and weights that stream, with LoRAs that come and go, so pins are written and dropped."""
    path = checkpoint("flux")

    def graph(model):
        lora = with_lora(model, forms("lora"))
        return [run(model), run(lora), run(lora), run(model)]

    wanted = graph(comfy.sd.load_diffusion_model(path))
    mm.unload_all_models()
    assert_same(graph(comfy_load.load_diffusion_model(path, policy=HALF)), wanted)


def shrunk(checkpoint):
    path = checkpoint("flux")
    wanted = run(comfy.sd.load_diffusion_model(path))
    mm.unload_all_models()
    ours = comfy_load.load_diffusion_model(path, policy=HALF)
    assert_same(run(ours), wanted)
    assert ours.dynamic.peak_resident_bytes <= HALF.vram_bytes
    ours.set_policy(Policy(vram_bytes=0))
    assert_same(run(ours), wanted)
    assert ours.dynamic.resident_bytes == 0


def decoded(checkpoint):
    path, latent = checkpoint("wan_vae"), torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    wanted = comfyui_vae(path).decode(latent)
    mm.unload_all_models()
    assert_same(comfy_load.load_vae(path, HALF).decode(latent), wanted)


def clone_by_clone(checkpoint):
    path = checkpoint("flux")
    core, ours = comfy.sd.load_diffusion_model(path), comfy_load.load_diffusion_model(path, policy=HALF)
    wanted = run(core), run(with_lora(core, forms("lora")))
    mm.unload_all_models()
    for model, latents in ((ours, wanted[0]), (with_lora(ours, forms("lora")), wanted[1]), (ours, wanted[0])):
        assert_same(run(model), latents)


CASTER = "ops.lending.device_caster:DeviceCaster"
FAULTS = {
    "no wait before fresh memory is filled": (
        sampled, f"{CASTER}.start", "self.backend.wait(self.backend.record(None), stream)", "pass",
    ),
    "no wait for a transfer": (sampled, f"{CASTER}.complete", "self.backend.wait(loan.event, None)", "pass"),
    "no wait for a write-back": (sampled, f"{CASTER}.start", "self.backend.wait(pin.ready, stream)", "pass"),
    "no wait before a write-back": (
        sampled, f"{CASTER}._write_back", "self.backend.wait(self.backend.record(None), stream)", "pass",
    ),
    "no wait for a slot": (sampled, "ops.lending.ring:Ring.take", "slot.done.synchronize()", "pass"),
    "nothing placed permanently": (
        decoded, "patcher.comfyui.patches.idle_reads:place_permanently", "if dynamic.backend.in_place", "if True",
    ),
    "a patch on the CPU": (
        sampled, "patcher.comfyui.patches.weight_patch:WeightPatch.__call__", "return weight", "return weight.cpu()",
    ),
    "the limit ignored": (
        shrunk, "ops.vbar.software:SoftwareVBAR.set_limit", "self.limit = nbytes", "self.limit = None",
    ),
    "nothing loaded again": (
        clone_by_clone, "patcher.comfyui.patcher:DynamicModelPatcher.partially_load",
        "with self.use", "if self.loaded_size():\n        return 0\n    with self.use",
    ),
}  # fmt: skip


def outcome(card, check, checkpoint):
    """What is wrong: an error's words, or the first hazard, or None."""
    try:
        check(checkpoint)
        gc.collect()
        card.driver.call("cuCtxSynchronize")
    except (AssertionError, RuntimeError) as error:
        return str(error) or type(error).__name__
    finally:
        mm.unload_all_models()
        gc.collect()
        hazards = card.hazards()
    return hazards[0] if hazards else None


@pytest.mark.parametrize("check", [sampled, shrunk, decoded, clone_by_clone])
def test_without_a_fault_all_is_right(card, check, checkpoint):
    assert outcome(card, check, checkpoint) is None


@pytest.mark.slow
@pytest.mark.parametrize(("check", "where", "words", "others"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(card, check, where, words, others, checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        plant(patch, where, words, others)
        seen = outcome(card, check, checkpoint)
        mm.unload_all_models()
        gc.collect()
    assert seen is not None
