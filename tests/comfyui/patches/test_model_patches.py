"""ComfyUI's model patches (control nets beside the model) on the pack's models: equal latents, and dynamic
themselves.
"""

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_patch import (
    ModelPatchLoader,
    QwenImageDiffsynthControlnet,
    USOStyleReference,
    ZImageFunControlnet,
)

from kit.comfyui import checkpoints, sampling
from kit.comfyui.pairs import assert_same, budget, comfyui_vae, run
from spillway.ops.lending.layer import DynamicLayer
from spillway.patcher.comfyui.loading import load as comfy_load


def load_patch(models_dir, kind, **options):
    path = models_dir / "model_patches" / f"small-{kind}.safetensors"
    getattr(checkpoints, kind)(path, **options)
    with checkpoints.small_patches(qwen_dim=256, qwen_layers=3, z_dim=256, uso_hidden=128):
        return ModelPatchLoader().load_model_patch(path.name)[0]


class Case:
    """A model file, a patch, and how to attach it."""

    def __init__(self, kind, checkpoint, models_dir):
        patches = {
            "z_image_control": ("patch_z_image_control", {"dim": 256}),
            "qwen_diffsynth": ("patch_qwen_diffsynth", {"dim": 256, "layers": 3}),
            "uso": ("patch_uso", {"hidden": 128}),
            "wan_uni3c": ("patch_wan_uni3c", {}),
        }
        self.kind = kind
        if kind == "wan_uni3c":
            pytest.importorskip("comfy.ldm.wan.uni3c")
        if kind == "uso":
            self.path = checkpoint("flux", hidden=128, depth=1, depth_single=1)
        else:
            self.path = checkpoint("wan" if kind == "wan_uni3c" else "z_image")
            self.vae = comfyui_vae(checkpoint("flux_vae" if kind == "z_image_control" else "wan_vae"))
        self.patch = load_patch(models_dir, patches[kind][0], **patches[kind][1])

    def attach(self, model):
        if self.kind == "uso":
            generator = torch.Generator().manual_seed(2)

            class Encoded:
                all_hidden_states = torch.randn(1, 27, 729, 1152, generator=generator)
                penultimate_hidden_states = all_hidden_states[:, -2]

            return USOStyleReference().apply_patch(model, self.patch, Encoded)[0]
        if self.kind == "wan_uni3c":
            from comfy_extras.nodes_model_patch import WanUni3CControlnetApply

            video = sampling.image(32, 32, batch=5)
            return WanUni3CControlnetApply().apply_patch(model, self.patch, self.vae, video, 1.0, 0.0, 1.0)[0]
        node = ZImageFunControlnet if self.kind == "z_image_control" else QwenImageDiffsynthControlnet
        return node().diffsynth_controlnet(model, self.patch, self.vae, image=sampling.image(32, 32))[0]


@pytest.fixture(params=["z_image_control", "qwen_diffsynth", "uso", "wan_uni3c"])
def case(request, checkpoint, models_dir):
    return Case(request.param, checkpoint, models_dir)


def patch_models(module):
    return [type(part) for part in module.modules()]


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_a_model_patch_gives_comfyuis_latents_within_the_budget(fraction, case):
    classic = comfy.sd.load_diffusion_model(case.path)
    ours = comfy_load.load_diffusion_model(case.path, policy=budget(classic, fraction))
    plain, wanted = run(classic), run(case.attach(classic))
    assert not torch.equal(plain, wanted)
    mm.unload_all_models()
    classes = patch_models(case.patch.model)

    patched = case.attach(ours)
    assert_same(run(patched), wanted)
    (twin,) = set(patched.model_patches_models())
    assert twin.is_dynamic() and twin.model is case.patch.model and not case.patch.is_dynamic()
    assert twin in mm.loaded_models() and twin.loaded_size() == twin.dynamic.resident_bytes > 0
    assert any(isinstance(module, DynamicLayer) for module in twin.model.modules())
    assert_same(run(ours), plain)

    # The patch is ComfyUI's again as soon as a model of ComfyUI's uses it, and ours after that.
    for _ in range(2):
        if (
            case.kind == "wan_uni3c"
        ):  # in the middle of a step it loads all models again that were in use on this device
            mm.unload_all_models()
        assert_same(run(case.attach(classic)), wanted)
        assert patch_models(case.patch.model) == classes
        assert_same(run(patched), wanted)


def test_a_patch_that_comfyui_has_loaded_goes_over_to_our_model(case):
    """A patch in use by a model of ComfyUI's goes over to one of ours, and back."""
    classic = case.attach(comfy.sd.load_diffusion_model(case.path))
    ours = case.attach(comfy_load.load_diffusion_model(case.path))
    wanted = run(classic)
    assert case.patch in mm.loaded_models()
    assert_same(run(ours), wanted)
    assert case.patch.loaded_size() == 0
    mm.unload_all_models()
    assert all(twin.loaded_size() == 0 for twin in ours.model_patches_models())
    assert_same(run(classic), wanted)
