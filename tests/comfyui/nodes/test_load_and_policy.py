"""The nodes, called as the executor calls them: what they return, and that it runs like ComfyUI's."""

import asyncio
import functools
import os
from pathlib import Path

import comfy.sd
import pytest
from comfy.sd1_clip import SDTokenizer
from comfy.text_encoders import hunyuan_video, long_clipl

from kit.comfyui import checkpoints, sampling
from kit.comfyui.dynamic_vram import holds_some
from kit.comfyui.pairs import SMALL, assert_same, comfyui_vae, run
from spillway.nodes.extension import SpillwayExtension
from spillway.nodes.load import SpillwayLoadCheckpoint, SpillwayLoadCLIP, SpillwayLoadDiffusionModel, SpillwayLoadVAE
from spillway.nodes.policy import GIB, SpillwayPolicy
from spillway.patcher.comfyui.loading.load import CHECKPOINT_DTYPES, WEIGHT_DTYPES

# Workflow files have this id from another pack's node of the same inputs.
NAMED_BY_WORKFLOWS = {"INT8LazyTorchCompile"}
AUTO = {"vram_gb": -1.0, "headroom_gb": -1.0, "pinned_gb": -1.0, "keep": "auto", "priority": 0}


@pytest.fixture
def file(checkpoint, models_dir):
    """`file("vae", "flux_vae")`: the name of such a file in that folder of models."""

    def place(folder, kind, **options):
        path = Path(checkpoint(kind, **options))
        link = models_dir / folder / path.name
        if not link.exists():
            os.symlink(path, link)
        return path.name

    return place


def policy_of(**changes):
    return SpillwayPolicy.execute(**{**AUTO, **changes}).args[1]


@pytest.mark.parametrize("node", asyncio.run(SpillwayExtension().get_node_list()), ids=lambda node: node.__name__)
def test_a_schema_explains_every_input_and_has_an_id_of_the_packs_own(node):
    """What the frontend is told: ids of the pack's own, every input explained, optional ones last and with defaults."""
    node.VALIDATE_CLASS()
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.node_id.startswith("Spillway") or schema.node_id in NAMED_BY_WORKFLOWS
    assert schema.display_name and schema.description and schema.category == "spillway"
    assert all(entry.tooltip for entry in schema.inputs)
    # ComfyUI itself gives output nodes hidden inputs: the prompt, for what they save.
    assert set(node.INPUT_TYPES()) <= {"required", "optional"} | ({"hidden"} if schema.is_output_node else set())
    assert schema.outputs


# "default", and formats that ComfyUI's own node has.
@pytest.mark.parametrize("weight_dtype", [name for name in WEIGHT_DTYPES if name not in CHECKPOINT_DTYPES[1:]])
def test_a_loaded_diffusion_model_gives_comfyuis_latents(weight_dtype, file, checkpoint):
    name = file("diffusion_models", "flux", **SMALL)
    (model,) = SpillwayLoadDiffusionModel.execute(unet_name=name, weight_dtype=weight_dtype).args
    options = dict(WEIGHT_DTYPES[weight_dtype])
    assert_same(run(model), run(comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL), model_options=options)))


def test_a_loaded_text_encoder_gives_comfyuis_conditioning(file, checkpoint):
    (clip,) = SpillwayLoadCLIP.execute(clip_name1=file("text_encoders", "clip_l"), type="stable_diffusion").args
    assert clip.patcher.is_dynamic()
    wanted = comfy.sd.load_clip([checkpoint("clip_l")])
    assert_same(sampling.text_encode(clip, "a red house"), sampling.text_encode(wanted, "a red house"))


def test_two_text_encoders_load_as_one(file, checkpoint, monkeypatch):
    """CLIP-L and a T5-XXL as one CLIP; the T5 is narrow, which ComfyUI accepts only with a configuration."""
    load_clip, options = comfy.sd.load_clip, checkpoints.T5XXL_SMALL_OPTIONS
    kinds = ("clip_l", "t5xxl_small")
    wanted = load_clip(
        [checkpoint(kind) for kind in kinds], clip_type=comfy.sd.CLIPType.FLUX, model_options=dict(options)
    )
    monkeypatch.setattr(comfy.sd, "load_clip", functools.partial(load_clip, model_options=dict(options)))
    first, second = (file("text_encoders", kind) for kind in kinds)
    (clip,) = SpillwayLoadCLIP.execute(clip_name1=first, clip_name2=second, type="flux").args
    assert_same(sampling.text_encode(clip, "a red house"), sampling.text_encode(wanted, "a red house"))


def test_four_text_encoders_load_as_one(file, checkpoint, monkeypatch):
    """As for HiDream: two CLIPs, a T5 and a Llama, all but one of them narrow."""
    load_clip = comfy.sd.load_clip
    # Llama's own tokenizer is a file of megabytes, which a ComfyUI may lack. CLIP's tokens are rows of its table too.
    monkeypatch.setattr(hunyuan_video, "LLAMA3Tokenizer", lambda min_length, pad_token, **o: SDTokenizer(**o))
    made = [("clip_l", {}), ("clip_g_small", {}), ("t5xxl_small", {}), ("small_llama", {"name": "llama"})]

    # It would replace the options of a narrow CLIP by those of a Long-CLIP.
    monkeypatch.setattr(long_clipl, "model_options_long_clip", lambda _, tokenizer, options: (tokenizer, options))

    def options():
        sizes = {**checkpoints.T5XXL_SMALL_OPTIONS, **checkpoints.small_llama_options("llama")}
        return {**sizes, "clip_g_model_config": checkpoints.CLIP_G_SMALL}

    kind = comfy.sd.CLIPType.HIDREAM
    wanted = load_clip([checkpoint(name, **rest) for name, rest in made], clip_type=kind, model_options=options())
    monkeypatch.setattr(comfy.sd, "load_clip", functools.partial(load_clip, model_options=options()))
    names = {f"clip_name{place}": file("text_encoders", name, **rest) for place, (name, rest) in enumerate(made, 1)}
    (clip,) = SpillwayLoadCLIP.execute(**names, type="hidream", policy=policy_of(vram_gb=0.0)).args
    encoded = [one.encode_from_tokens(one.tokenize("a red house"), return_dict=True) for one in (clip, wanted)]
    for name in ("cond", "pooled_output", "conditioning_llama3"):
        assert encoded[1][name].std() > 0
        assert_same(encoded[0][name], encoded[1][name])
    assert clip.patcher.dynamic.peak_resident_bytes == 0


def test_text_encoders_that_do_not_belong_together_are_an_error(file):
    names = {"clip_name1": file("text_encoders", "clip_l"), "clip_name2": file("text_encoders", "t5_base")}
    with pytest.raises(ValueError, match=r"(?s)t5_base.*could not read"):
        SpillwayLoadCLIP.execute(**names, type="flux")


def test_a_loaded_vae_gives_comfyuis_pictures(file, checkpoint):
    (vae,) = SpillwayLoadVAE.execute(vae_name=file("vae", "flux_vae")).args
    latent = sampling.latent(16, 32, 32)
    assert_same(sampling.vae_decode(vae, latent), sampling.vae_decode(comfyui_vae(checkpoint("flux_vae")), latent))


def test_a_checkpoint_of_a_model_alone_has_no_other_outputs(file, checkpoint):
    model, clip, vae, clip_vision = SpillwayLoadCheckpoint.execute(ckpt_name=file("checkpoints", "flux", **SMALL)).args
    assert clip is None and vae is None and clip_vision is None
    assert_same(run(model), run(comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))))


def test_the_clip_vision_of_a_checkpoint_is_dynamic_too(file, checkpoint):
    """An unCLIP checkpoint: its CLIP vision model is dynamic too. It has no text encoder and no VAE."""
    name = file("checkpoints", "unclip")
    with checkpoints.small_clip_vision():
        model, clip, vae, clip_vision = SpillwayLoadCheckpoint.execute(
            ckpt_name=name, policy=policy_of(vram_gb=0.0)
        ).args
        classic, _, _, comfyui_vision = comfy.sd.load_checkpoint_guess_config(
            checkpoint("unclip"), output_clipvision=True
        )
    assert clip is None and vae is None and clip_vision.patcher.is_dynamic()
    outputs = [encoder.encode_image(sampling.image(224, 224)) for encoder in (clip_vision, comfyui_vision)]
    for name in ("last_hidden_state", "image_embeds", "penultimate_hidden_states"):
        assert outputs[1][name].std() > 0
        assert_same(outputs[0][name], outputs[1][name])
    assert clip_vision.patcher.dynamic.peak_resident_bytes == 0
    assert_same(run(model, steps=1), run(classic, steps=1))


# --- the policy -------------------------------------------------------------------------------------------------------


def test_values_of_the_policy_node_become_a_policy():
    assert policy_of().vram_bytes is None and policy_of().keep == "auto"
    policy = policy_of(vram_gb=1.5, headroom_gb=0.0, pinned_gb=0.25, keep="always", priority=-3)
    assert (policy.vram_bytes, policy.headroom_bytes, policy.pinned_bytes) == (GIB * 3 // 2, 0, GIB // 4)
    assert policy.keep == "always" and policy.priority == -3


def test_a_policy_reaches_the_loader(file):
    name = file("diffusion_models", "flux", **SMALL)
    policy = policy_of(vram_gb=0.0015)  # less than the model in 16 bit too
    (model,) = SpillwayLoadDiffusionModel.execute(unet_name=name, weight_dtype="default", policy=policy).args
    run(model)
    assert (model.dynamic.peak_resident_bytes > 0) == holds_some(policy)
    assert model.dynamic.peak_resident_bytes <= policy.vram_bytes < model.dynamic.total_bytes


def test_the_policy_node_changes_a_clone_only(file):
    """The budget in force is that of the model that runs; the one that came in keeps its own."""
    name = file("diffusion_models", "flux", **SMALL)
    (model,) = SpillwayLoadDiffusionModel.execute(unet_name=name, weight_dtype="default").args
    wanted = run(model)
    everything = model.dynamic.resident_bytes
    small, policy = SpillwayPolicy.execute(**{**AUTO, "vram_gb": 0.001}, model=model).args
    assert small is not model and small.model is model.model
    assert model.policy.vram_bytes is None and small.policy is policy
    for _ in range(2):
        assert_same(run(small), wanted)
        assert small.dynamic.resident_bytes <= policy.vram_bytes
        assert_same(run(model), wanted)
        assert model.dynamic.resident_bytes == everything


def test_free_after_use_holds_nothing_between_runs(file):
    name = file("diffusion_models", "flux", **SMALL)
    (model,) = SpillwayLoadDiffusionModel.execute(
        unet_name=name, weight_dtype="default", policy=policy_of(keep="free after use")
    ).args
    wanted = run(model)
    assert model.dynamic.resident_bytes == 0 and model.dynamic.peak_resident_bytes > 0
    assert_same(run(model), wanted)


def test_the_policy_node_without_a_model_stops_what_hangs_on_its_model_output(file):
    """The MODEL output then stops what hangs on it, with the reason; the policy output is of use."""
    blocked, policy = SpillwayPolicy.execute(**AUTO).args
    assert "no model is connected" in blocked.message and policy.vram_bytes is None


def test_the_policy_node_refuses_a_model_of_others(checkpoint):
    with pytest.raises(ValueError, match=r"not managed by Spillway.*Make Dynamic"):
        SpillwayPolicy.execute(**AUTO, model=comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL)))
