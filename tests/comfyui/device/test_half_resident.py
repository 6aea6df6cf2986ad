"""Models of which some weights stay on the device and some are brought: the pictures of ComfyUI's own loaders."""

import comfy.model_management as mm
import comfy.sd
import pytest
import torch

from kit.comfyui.loras import SHAPES, forms, with_lora
from kit.comfyui.pairs import assert_same, comfyui_vae, run
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

HALF = Policy(vram_bytes=1 << 20, headroom_bytes=0)
CUDA = torch.device("cuda", 0)


def test_loras_come_and_go(card, flux):
    """So pins are written, read and dropped."""

    def graph(model):
        lora = with_lora(model, forms("lora"))
        return [run(model), run(lora), run(lora), run(model)]

    wanted = graph(comfy.sd.load_diffusion_model(flux))
    mm.unload_all_models()
    assert_same(graph(comfy_load.load_diffusion_model(flux, policy=HALF)), wanted)


def test_a_budget_is_kept_and_followed(card, flux):
    wanted = run(comfy.sd.load_diffusion_model(flux))
    mm.unload_all_models()
    ours = comfy_load.load_diffusion_model(flux, policy=HALF)
    assert_same(run(ours), wanted)
    assert ours.dynamic.peak_resident_bytes <= HALF.vram_bytes
    ours.set_policy(Policy(vram_bytes=0))
    assert_same(run(ours), wanted)
    assert ours.dynamic.resident_bytes == 0


def test_a_video_vae_decodes(card, checkpoint):
    path, latent = checkpoint("wan_vae"), torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    wanted = comfyui_vae(path).decode(latent)
    mm.unload_all_models()
    assert_same(comfy_load.load_vae(path, HALF).decode(latent), wanted)


def test_each_clone_has_its_own_patches(card, flux):
    core, ours = comfy.sd.load_diffusion_model(flux), comfy_load.load_diffusion_model(flux, policy=HALF)
    wanted = run(core), run(with_lora(core, forms("lora")))
    mm.unload_all_models()
    for model, latents in ((ours, wanted[0]), (with_lora(ours, forms("lora")), wanted[1]), (ours, wanted[0])):
        assert_same(run(model), latents)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "glora", "oft", "diff", "set"])
def test_patches_are_made_on_the_device(card, flux, kind):
    """A result in host memory would be copied, so that the picture is right and each patch takes its time."""
    model = with_lora(comfy_load.load_diffusion_model(flux, policy=HALF), forms(kind))
    mm.load_models_gpu([model])
    patched = [param for bundle in model.dynamic.bundles for param in bundle.params if param.patch is not None]
    assert len(patched) >= len(SHAPES)
    for param in patched:
        weight = param.source.to(CUDA, param.final.dtype)
        assert param.patch(weight).device == CUDA, param.key


def test_buffers_are_on_the_device_while_a_model_is_loaded(card, checkpoint):
    model = comfy_load.load_checkpoint(checkpoint("sd15", mult=(1,)), HALF)[0]
    assert [buffer for buffer in model.model.buffers() if buffer.device.type == "cpu"]
    mm.load_models_gpu([model])
    assert {buffer.device for buffer in model.model.buffers()} == {CUDA}
    mm.unload_all_models()
    assert {buffer.device.type for buffer in model.model.buffers()} == {"cpu"}
