"""Make Dynamic: models of ComfyUI's loaders, with what they carry, run the same; what came in stays as it was."""

import comfy.model_patcher
import comfy.sd
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.hooks import hook_lora, hooked
from kit.comfyui.loras import forms, numbers, with_lora
from kit.comfyui.pairs import SMALL, assert_same, comfyui_vae, run
from spillway.nodes.load import SpillwayMakeDynamic
from spillway.patcher.attach import Unsupported
from spillway.patcher.comfyui.loading.adopt import dynamic_model
from spillway.patcher.comfyui.patcher import DynamicModelPatcher
from spillway.patcher.policy import Policy


def make_dynamic(model, **others):
    return SpillwayMakeDynamic.execute(model=model, **others).args


@pytest.fixture(params=["its file", "memory"])
def classic(request, checkpoint):
    """A MODEL of ComfyUI's; with a way to load it again, or without (as from a loader that keeps none)."""
    model = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    if request.param == "memory":
        model.cached_patcher_init = None
    return model


@pytest.mark.parametrize("budget", [None, 1 << 20, 0])
def test_a_model_made_dynamic_gives_the_originals_latents_within_its_budget(budget, classic):
    wanted = run(classic)
    made, clip, vae = make_dynamic(classic, policy=Policy(vram_bytes=budget))
    assert isinstance(made, DynamicModelPatcher) and clip is None and vae is None
    assert made.model is not classic.model
    for _ in range(2):
        assert_same(run(made), wanted)
        assert_same(run(classic), wanted)
    if budget is not None:
        assert made.dynamic.peak_resident_bytes <= budget


@pytest.mark.parametrize("state", ["never run", "loaded", "loaded with a LoRA"])
def test_loras_go_with_the_model_whatever_is_loaded(state, classic):
    """Patches go with the model; those that its owner has loaded at the time are not mistaken for weights."""
    patched = with_lora(with_lora(classic, forms("lora"), 0.7), forms("diff"), -0.3)
    if state != "never run":
        run(classic if state == "loaded" else patched)
    made, _, _ = make_dynamic(patched)
    wanted, plain = run(patched), run(classic)
    assert not torch.equal(wanted, plain)
    assert_same(run(made), wanted)
    assert_same(run(make_dynamic(classic)[0]), plain)
    assert_same(run(with_lora(made, forms("loha"))), run(with_lora(patched, forms("loha"))))
    assert_same(run(patched), wanted)
    assert_same(run(classic), plain)


def test_the_original_is_left_alone(classic):
    run(classic)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in classic.model.named_parameters()}
    classes = [type(module) for module in classic.model.modules()]
    made, _, _ = make_dynamic(classic)
    run(with_lora(made, forms("lora")))
    assert [type(module) for module in classic.model.modules()] == classes
    for name, tensor in classic.model.named_parameters():
        assert before[name][0] == id(tensor) and torch.equal(before[name][1], tensor)
    assert not {id(module) for module in classic.model.modules()} & {id(module) for module in made.model.modules()}


def test_what_patchers_keep_on_a_model_is_not_copied(checkpoint):
    """ComfyUI's dynamic VRAM keeps buffers there, of which a copy would be given back twice."""

    class Buffer:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    classic = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    classic.cached_patcher_init = None
    classic.model.dynamic_pins = {"cpu": {"buffers": [Buffer()]}}
    made, _, _ = make_dynamic(classic)
    assert made.model.dynamic_pins is not classic.model.dynamic_pins
    del classic.model.dynamic_pins


def test_the_copy_of_a_model_without_a_file_shares_its_memory(checkpoint):
    """A model without a file is not doubled: its copy has modules of its own around the same tensors."""
    classic = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    classic.cached_patcher_init = None
    made, _, _ = make_dynamic(classic)
    theirs = {name: tensor.data_ptr() for name, tensor in classic.model.named_parameters()}
    ours = made.model.state_dict()  # where an idle weight stands, its source
    assert {name: ours[name].data_ptr() for name in theirs} == theirs


def test_options_and_hooks_go_with_the_model(classic):
    """What other nodes attached: model options, object patches, wrappers, hooks."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    (classic,) = ModelSamplingFlux().patch(classic, 1.2, 0.4, 64, 64)
    classic.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
    made, _, _ = make_dynamic(classic)
    assert_same(run(made), run(classic))
    assert_same(hooked(made, hook_lora()), hooked(classic, hook_lora()))
    made.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0)
    assert len(classic.model_options["sampler_post_cfg_function"]) == 1


def test_a_model_that_is_dynamic_already_gets_the_policy(classic):
    made, _, _ = make_dynamic(classic, policy=Policy(vram_bytes=1 << 20))
    again, _, _ = make_dynamic(made, policy=Policy(vram_bytes=0))
    assert again is not made and again.model is made.model
    assert made.policy.vram_bytes == 1 << 20 and again.policy.vram_bytes == 0
    assert make_dynamic(made)[0].policy == made.policy


@pytest.mark.parametrize("source", ["its file", "memory"])
def test_a_text_encoder_and_a_vae_made_dynamic_give_the_originals_outputs(source, checkpoint):
    classic = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    clip, vae = comfy.sd.load_clip([checkpoint("clip_l")]), comfyui_vae(checkpoint("flux_vae"))
    if source == "memory":
        clip.patcher.cached_patcher_init = vae.patcher.cached_patcher_init = None
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    lora = {f"{stem}.lora_up.weight": numbers(768, 4), f"{stem}.lora_down.weight": numbers(4, 768)}
    clip = comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.1)[1]
    clip.clip_layer(-2)
    latent = sampling.latent(16, 32, 32)
    texts, picture = sampling.text_encode(clip, "a house"), sampling.vae_decode(vae, latent)
    _, made_clip, made_vae = make_dynamic(classic, clip=clip, vae=vae)
    assert made_clip.patcher.is_dynamic() and made_vae.patcher.is_dynamic() and not vae.patcher.is_dynamic()
    for _ in range(2):
        assert_same(sampling.text_encode(made_clip, "a house"), texts)
        assert_same(sampling.vae_decode(made_vae, latent), picture)
        assert_same(sampling.text_encode(clip, "a house"), texts)
        assert_same(sampling.vae_decode(vae, latent), picture)


# --- what cannot be made dynamic --------------------------------------------------------------------------------------


class Packed(torch.Tensor):
    """A tensor class as other packs bring them: nobody but its own ops knows how its bytes are laid out."""


def test_a_tensor_class_that_cannot_be_laid_out_is_refused_with_its_key(checkpoint):
    classic = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    classic.cached_patcher_init = None
    classic.model.diffusion_model.img_in.weight = torch.nn.Parameter(
        classic.model.diffusion_model.img_in.weight.detach().as_subclass(Packed), requires_grad=False
    )
    with pytest.raises(Unsupported, match=r"'diffusion_model\.img_in\.weight' is a Packed.*own loader"):
        make_dynamic(classic)


def test_a_vae_that_is_never_offloaded_is_refused(checkpoint):
    classic, vae = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL)), comfyui_vae(checkpoint("flux_vae"))
    vae.disable_offload = True
    with pytest.raises(Unsupported, match=r"never offloads; connect it directly"):
        make_dynamic(classic, vae=vae)


def test_a_model_that_comfyui_has_mapped_is_refused(checkpoint, monkeypatch):
    """ComfyUI's own dynamic models lie where only ComfyUI can read them, unless their loader can load them again."""
    classic = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "is_dynamic", lambda self: True)
    classic.cached_patcher_init = None
    with pytest.raises(Unsupported, match=r"own dynamic VRAM has mapped this model.*Spillway loaders"):
        make_dynamic(classic)


def test_what_is_no_patcher_is_refused():
    with pytest.raises(Unsupported, match=r"a dict is no model patcher that Spillway knows.*Spillway loaders"):
        dynamic_model({"model": None})
