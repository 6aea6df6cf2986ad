"""Saved checkpoints: what ComfyUI's own node would write, of model, text encoder, VAE and CLIP vision."""

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints, sampling
from kit.comfyui.loras import numbers
from kit.comfyui.pairs import assert_same, comfyui_vae
from kit.comfyui.saving import assert_same_tensors, comfyui_save, read, save
from spillway.ops.files import deferred
from spillway.patcher.comfyui.loading.load import load_checkpoint

pytestmark = pytest.mark.usefixtures("output")
TEXT = "text_model.encoder.layers.3.self_attn.q_proj"


def test_a_saved_checkpoint_is_comfyuis_and_loads_there(checkpoint, tmp_path, small_parts):
    """Model, text encoder and VAE, the first two with LoRAs; what ComfyUI's node writes, and it loads."""
    path = checkpoint("sd15")
    stem = "lora_te_" + TEXT.replace(".", "_")
    lora = {
        f"{stem}.lora_up.weight": numbers(768, 4, scale=0.2),
        f"{stem}.lora_down.weight": numbers(4, 768),
        "diffusion_model.input_blocks.1.0.in_layers.2.lora_up.weight": numbers(320, 4, 1, 1, scale=0.1),
        "diffusion_model.input_blocks.1.0.in_layers.2.lora_down.weight": numbers(4, 320, 3, 3),
    }
    classic = comfy.sd.load_checkpoint_guess_config(path)[:3]
    ours = load_checkpoint(path)[:3]
    classic, ours = (
        (*comfy.sd.load_lora_for_models(*three[:2], lora, 0.8, 0.6), three[2]) for three in (classic, ours)
    )
    wanted, comfyui_metadata = read(comfyui_save(classic[0], clip=classic[1], vae=classic[2]))
    saved = save(ours[0], clip=ours[1], vae=ours[2])
    got, metadata = read(saved)
    assert metadata == comfyui_metadata
    for key in wanted:  # ComfyUI keeps fp32 copies of fp16 files on a CPU
        assert torch.equal(got[key], wanted[key].to(got[key].dtype)), key
    # A device may compute a VAE in bf16, which is as small as the file's fp16.
    kept = {dtype for dtype in (torch.float16, ours[2].vae_dtype) if dtype.itemsize == 2}
    assert set(got) == set(wanted) and {t.dtype for t in got.values() if t.dtype.is_floating_point} == kept
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(saved)[:3]
    loaded = [
        (key, value)
        for part in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model)
        for key, value in part.state_dict().items()
    ]
    source = [
        (key, value)
        for part in (ours[0].model.diffusion_model, ours[1].cond_stage_model, ours[2].first_stage_model)
        for key, value in part.state_dict().items()
    ]
    unlike = [
        key
        for (key, value), (_, before) in zip(loaded, source, strict=True)
        if not torch.equal(value, before.to(value)) and "text_projection" not in key  # no file of SD 1.5 has that
    ]
    assert unlike == ["input_blocks.1.0.in_layers.2.weight", f"clip_l.transformer.{TEXT}.weight"]
    latent = sampling.latent(4, 32, 32)
    assert_same(sampling.vae_decode(vae, latent), sampling.vae_decode(classic[2], latent))


def test_a_saved_checkpoint_has_the_clip_vision(checkpoint):
    with checkpoints.small_clip_vision():
        path = checkpoint("unclip")
        classic = comfy.sd.load_checkpoint_guess_config(path, output_clipvision=True)
        ours = load_checkpoint(path)
        clip = comfy.sd.load_clip([checkpoint("clip_l")])
        vae = comfyui_vae(checkpoint("sd_vae"))
        saved = save(ours[0], clip=clip, vae=vae, clip_vision=ours[3], dtype="bf16")
        got, _ = read(saved)
        vision = {key: tensor for key, tensor in classic[3].get_sd().items() if tensor.dtype.is_floating_point}
        assert len(vision) > 300
        for key, tensor in vision.items():
            assert torch.equal(got[f"embedder.model.visual.{key}"], tensor.bfloat16())


def test_weights_that_comfyui_joins_are_joined_lazily():
    """SD 2's and SDXL's query, key and value are one tensor in a checkpoint."""
    from comfy.diffusers_convert import convert_text_enc_state_dict_v20

    stem = "clip_g.transformer.text_model.encoder.layers.0.self_attn"
    tensors = {f"{stem}.{name}_proj.weight": numbers(8, 8, seed=place) for place, name in enumerate("qkv")}
    tensors |= {f"{stem}.{name}_proj.bias": numbers(8, seed=place) for place, name in enumerate("qkv")}
    tensors["clip_g.transformer.text_projection.weight"] = numbers(6, 8)
    wanted = convert_text_enc_state_dict_v20(dict(tensors), "clip_g")
    with deferred.Assembling() as assembling:
        lazy = {k: deferred.Deferred.of(deferred.Stored(t), tuple(t.shape), t.dtype) for k, t in tensors.items()}
        got = convert_text_enc_state_dict_v20(lazy, "clip_g")
        got = {key: assembling.resolve(tensor) for key, tensor in got.items()}
    assert len(wanted) == 3
    assert_same_tensors({key: deferred.whole(tensor) for key, tensor in got.items()}, wanted)
