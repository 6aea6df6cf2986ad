"""Every variant of the control patches for Qwen-Image and Z-Image gives ComfyUI's latents while everything streams."""

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_model_patch import ModelPatchLoader, ZImageFunControlnet

from kit.comfyui import checkpoints, sampling
from kit.comfyui.pairs import assert_same, comfyui_vae, run
from spillway.patcher.comfyui.loading.companions import load_model_patch
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.policy import Policy

NOTHING = Policy(vram_bytes=0, pinned_bytes=0)
MASK = torch.zeros(1, 32, 32)
MASK[:, 8:24, 8:24] = 1.0
# name -> (kind, options of the patch's file, whether it takes inpainting inputs)
VARIANTS = {
    "z image": ("z_image", {"layers": 6}, False),
    "z image, refiner blocks": ("z_image", {"layers": 3}, True),
    "z image, refiner blocks and 15 layers": ("z_image", {"layers": 15}, True),
    "z image, 15 layers, refiner not trained": ("z_image", {"layers": 15}, True),
    "qwen": ("qwen_image", {"layers": 3}, False),
    "qwen, inpainting": ("qwen_image", {"layers": 3, "extra_channels": 4}, True),
}


QUICK = ("z image, refiner blocks", "qwen, inpainting")


def patch_file(folder, name, kind, options):
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.safetensors"
    if kind == "z_image":
        checkpoints.patch_z_image_control(path, dim=256, **options)
    else:
        checkpoints.patch_qwen_diffsynth(path, dim=256, **options)
    if "not trained" in name:  # ComfyUI knows such a file by these zeros
        tensors = dict(comfy.utils.load_torch_file(str(path)))
        key = "control_noise_refiner.0.after_proj.weight"
        tensors[key] = torch.zeros_like(tensors[key])
        comfy.utils.save_torch_file(tensors, str(path))
    return path


def attached(model, patch, vae, inpaints, masked):
    more = {"inpaint_image": sampling.image(32, 32, seed=9)} if inpaints and vae.latent_channels == 16 else {}
    mask = {"mask": MASK} if inpaints and masked else {}
    image = sampling.image(32, 32)
    return ZImageFunControlnet().diffsynth_controlnet(model, patch, vae, image=image, **more, **mask)[0]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def test_a_control_patch_gives_comfyuis_latents_while_everything_streams(name, checkpoint, models_dir):
    kind, options, inpaints = VARIANTS[name]
    path = patch_file(models_dir / "model_patches", name, kind, options)
    # 15 control layers belong to every second of 30 layers, of which this model has the first.
    model_file = checkpoint(kind) if kind == "qwen_image" else checkpoint(kind, layers=8)
    vae = comfyui_vae(checkpoint("wan_vae" if kind == "qwen_image" else "flux_vae"))
    with checkpoints.small_patches(qwen_dim=256, qwen_layers=3, z_dim=256):
        patches = ModelPatchLoader().load_model_patch(path.name)[0], load_model_patch(path.name, NOTHING)
    if kind == "z_image":
        control = patches[1].model
        assert control.refiner_control == (options["layers"] != 6) and control.broken == ("not trained" in name)
    models = comfy.sd.load_diffusion_model(model_file), load_diffusion_model(model_file, policy=NOTHING)
    plain = run(models[0])
    for masked in (False, True) if inpaints else (False,):
        wanted, got = (
            run(attached(model, patch, vae, inpaints, masked)) for model, patch in zip(models, patches, strict=True)
        )
        assert not torch.equal(wanted, plain)
        assert_same(got, wanted)
    for patcher in (models[1], patches[1]):
        dynamic = patcher.dynamic
        assert dynamic.ledger.counters.bytes_streamed or dynamic.backend.in_place
        assert dynamic.ledger.counters.steps > 0 and dynamic.peak_resident_bytes == 0
    # The patch that streams serves a model of ComfyUI's as well.
    assert_same(run(attached(models[0], patches[1], vae, inpaints, inpaints)), wanted)
