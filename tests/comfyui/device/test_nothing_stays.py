"""What a model, a text encoder and a VAE took of the device is given back to the byte, with LoRAs and without."""

import gc

import comfy.model_management as mm
import comfy.sd
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.loras import forms, numbers, with_lora
from kit.comfyui.pairs import run
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

BUDGETS = {"all": Policy(headroom_bytes=0), "half": Policy(vram_bytes=1 << 20, headroom_bytes=0)}
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"


def held(card):
    mm.unload_all_models()
    gc.collect()
    card.drop_cached()
    return card.memory("used"), card.get("allocated"), card.get("mapped")


def sample(checkpoint, policy, lora):
    model = comfy_load.load_diffusion_model(checkpoint("flux", hidden=128, depth=1, depth_single=1), policy=policy)
    run(with_lora(model, forms("lora")) if lora else model, steps=1)


def encode(checkpoint, policy, lora):
    clip = comfy_load.load_checkpoint(checkpoint("sd15", mult=(1,)), policy)[1]
    if lora:
        tensors = {f"{TEXT}.lora_up.weight": numbers(768, 4), f"{TEXT}.lora_down.weight": numbers(4, 768)}
        clip = comfy.sd.load_lora_for_models(None, clip, tensors, 0, 1.0)[1]
        assert clip.patcher.patches
    sampling.text_encode(clip, "a fox")


def decode(checkpoint, policy, lora):
    vae = comfy_load.load_vae(checkpoint("flux_vae"), policy)
    if lora:
        vae.patcher.add_patches(
            {"decoder.conv_in.weight": (torch.ones_like(vae.first_stage_model.decoder.conv_in.weight),)}
        )
    sampling.vae_decode(vae, sampling.latent(16, 32, 32))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("use", [sample, encode, decode])
def test_nothing_of_a_model_stays_on_the_device(card, checkpoint, use, budget):
    before = held(card)
    for lora in (False, True):
        use(checkpoint, BUDGETS[budget], lora)
        assert held(card) == before, f"with a LoRA: {lora}"
