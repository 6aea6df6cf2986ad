"""GGUF models on a card: what making numbers of blocks takes is within the budget."""

import comfy.model_management as mm
import comfy.sd
import comfy.utils
import pytest

from kit.comfyui import checkpoints
from kit.comfyui.dynamic_vram import software
from kit.comfyui.pairs import assert_same, run
from kit.gguf_files import quantised_copy, write_gguf
from spillway.ops.lending.bundle import Bundle
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

WIDE = {"hidden": 256, "depth": 2, "depth_single": 4}


def peak(card, model):
    """Run a model from nothing. Return its latents and the most memory of the card that it took."""
    mm.unload_all_models()
    card.drop_cached()
    before = card.memory("used")
    card.library.fake_reset_peak(0)
    latents = run(model, steps=2, width=16, height=16)
    return latents, card.memory("peak") - before


def activations(card, path):
    """Return the memory of the card that a step takes beside weights that are all there."""
    whole = comfy_load.load_diffusion_model(path)
    options = {"steps": 1, "width": 16, "height": 16}
    run(whole, **options)
    before = card.memory("used")
    card.library.fake_reset_peak(0)
    run(whole, **options)
    return card.memory("peak") - before


@software
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_budget_holds_blocks_buffers_and_numbers(card, checkpoint, tmp_path, lora):
    tensors = comfy.utils.load_torch_file(checkpoint("flux", **WIDE))
    written, stands_for = quantised_copy(tensors, "IQ4_XS")  # of which making numbers takes most
    plain = checkpoints.write(tmp_path / "plain.safetensors", {name: part.float() for name, part in stands_for.items()})
    beside = activations(card, plain)
    gguf = write_gguf(tmp_path / "flux.gguf", written)
    model = comfy_load.load_diffusion_model(gguf)
    if lora:
        added = comfy.utils.load_torch_file(checkpoint("lora", base=checkpoint("flux", **WIDE)))
        model = comfy.sd.load_lora_for_models(model, None, added, 0.8, 0)[0]
    wanted, used = peak(card, model)
    bundles: list[Bundle] = model.dynamic.bundles
    blocks = sum(bundle.nbytes for bundle in bundles)
    budget = used - beside - blocks // 2
    assert budget > max(bundle.offload_cost() for bundle in bundles)
    model.set_policy(Policy(vram_bytes=budget))
    latents, used = peak(card, model)
    assert used - beside <= budget
    assert 0 < model.dynamic.resident_bytes < blocks
    assert_same(latents, wanted)
