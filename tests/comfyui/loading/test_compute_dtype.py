"""What one use of an offloaded layer costs, for each kind of model: the dtype that ComfyUI's ops cast to counts."""

import comfy.model_management as mm
import comfy.sd
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.loras import LINEAR, forms, with_lora
from kit.comfyui.pairs import SMALL, run
from spillway.patcher.comfyui.loading import load as comfy_load


def numel(bundle):
    return sum(param.source.numel() for param in bundle.params)


def padding(bundle):
    """What alignment adds to the final form, where that is made beside the source."""
    return (
        0 if bundle.source_is_final else bundle.nbytes - sum(p.source.numel() * p.final.itemsize for p in bundle.params)
    )


def bundle_of(patcher, key):
    return patcher.dynamic.by_key[key]


def test_a_text_encoders_layers_cost_their_cast_and_its_tables_do_not(checkpoint):
    """Kept in fp16, computed in fp32. A table is looked up before it is cast."""
    clip = comfy_load.load_clip([checkpoint("clip_l")])
    sampling.text_encode(clip, "a house")
    stem = "clip_l.transformer.text_model"
    linear = bundle_of(clip.patcher, f"{stem}.encoder.layers.3.mlp.fc1.weight")
    assert {param.final.dtype for param in linear.params} == {torch.float16}
    assert linear.offload_cost() == linear.source_bytes + 4 * numel(linear)
    table = bundle_of(clip.patcher, f"{stem}.embeddings.token_embedding.weight")
    assert table.offload_cost() == table.source_bytes
    lora = {
        "lora_te_text_model_encoder_layers_3_mlp_fc1.lora_up.weight": torch.ones(3072, 4),
        "lora_te_text_model_encoder_layers_3_mlp_fc1.lora_down.weight": torch.ones(4, 768),
    }
    patched = comfy.sd.load_lora_for_models(None, clip, lora, 0, 1.0)[1]
    sampling.text_encode(patched, "a house")
    weight, bias = linear.params
    assert linear.offload_cost() == linear.source_bytes + 4 * (2 * weight.source.numel() + bias.source.numel())


def test_a_vae_costs_a_cast_where_its_file_has_another_dtype(checkpoint):
    """Computed in the dtype that its weights are kept in: the file's is another, which costs the cast."""
    vae = comfy_load.load_vae(checkpoint("sd_vae"))
    sampling.vae_decode(vae, sampling.latent(4, 32, 32))
    for bundle in vae.patcher.dynamic.bundles:
        assert {param.final.dtype for param in bundle.params} == {vae.vae_dtype}
        cast = vae.vae_dtype.itemsize * numel(bundle) if any(param.is_cast for param in bundle.params) else 0
        assert bundle.offload_cost() == bundle.source_bytes + cast + padding(bundle)


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
def test_a_diffusion_model_costs_its_cast_and_a_patched_weight_twice_that(weight_dtype, checkpoint, monkeypatch):
    monkeypatch.setattr(mm, "unet_manual_cast", lambda *_, **__: torch.float32)  # as on a CPU
    model = comfy_load.load_diffusion_model(checkpoint("flux", **SMALL), weight_dtype)
    run(model, steps=1)
    bundle = bundle_of(model, f"{LINEAR}.weight")
    computes = model.model.manual_cast_dtype or bundle.params[0].final.dtype
    assert computes.itemsize == 4
    assert bundle.offload_cost() == bundle.source_bytes + 4 * numel(bundle) + padding(bundle)
    run(with_lora(model, forms("diff")), steps=1)
    assert bundle.offload_cost() == bundle.source_bytes + 8 * numel(bundle) + padding(bundle)
