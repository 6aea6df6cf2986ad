"""Which loader stands for which, with which values, there and back; and a whole workflow with ComfyUI's."""

import pytest

from kit.page_modules import copy_modules, run_script

LOADERS = [
    ("UNETLoader", {"unet_name": "a", "weight_dtype": "fp8_e4m3fn"}),
    ("CheckpointLoaderSimple", {"ckpt_name": "a"}),
    ("unCLIPCheckpointLoader", {"ckpt_name": "a"}),
    ("VAELoader", {"vae_name": "a"}),
    ("CLIPVisionLoader", {"clip_name": "a"}),
    ("ControlNetLoader", {"control_net_name": "a"}),
    ("DiffControlNetLoader", {"control_net_name": "a"}),
    ("UpscaleModelLoader", {"model_name": "a"}),
    ("AudioEncoderLoader", {"audio_encoder_name": "a"}),
    ("StyleModelLoader", {"style_model_name": "a"}),
    ("ModelPatchLoader", {"name": "a"}),
    ("LoraLoader", {"lora_name": "a", "strength_model": 0.5, "strength_clip": 0.7}),
    ("LoraLoaderModelOnly", {"lora_name": "a", "strength_model": 0.5}),
    ("CLIPLoader", {"clip_name": "a", "type": "lumina2"}),
    ("DualCLIPLoader", {"clip_name1": "a", "clip_name2": "b", "type": "flux"}),
    ("TripleCLIPLoader", {"clip_name1": "a", "clip_name2": "b", "clip_name3": "c"}),
    ("QuadrupleCLIPLoader", {"clip_name1": "a", "clip_name2": "b", "clip_name3": "c", "clip_name4": "d"}),
]
# Nothing of ComfyUI's does what these do.
OURS_ALONE = [
    ("SpillwayLoadDiffusionModel", {"unet_name": "a", "weight_dtype": "int8"}),
    ("SpillwayLoadCheckpoint", {"ckpt_name": "a", "weight_dtype": "default", "clip_dtype": "nvfp4"}),
    ("SpillwayLoadCLIP", {"clip_name1": "a", "type": "flux", "weight_dtype": "mxfp8"}),
    ("SpillwayLoadCLIP", {"clip_name1": "a", "clip_name2": "none", "clip_name3": "c", "type": "sd3"}),
    ("SpillwayLoadCLIP", {"clip_name1": "a", "clip_name2": "b", "clip_name3": "c", "type": "hidream"}),
    ("SpillwayMakeDynamic", {}),
]


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


WORKFLOW = {
    "1": node("SpillwayPolicy", vram_gb=1),
    "2": node("SpillwayLoadCheckpoint", ckpt_name="a", weight_dtype="default", clip_dtype="default", policy=["1", 1]),
    "3": node("CLIPVisionEncode", clip_vision=["2", 3]),
    "4": node("SpillwayLoadDiffusionModel", unet_name=["9", 0], weight_dtype="default"),
    "5": node("SpillwayLoadDiffusionModel", unet_name="a", weight_dtype="int8"),
    "6": node("SpillwayLoadControlNet", control_net_name="a", model=["4", 0]),
    "7": node("SpillwayLoraLoader", model=["2", 0], clip=["2", 1], lora_name="l", strength_model=1, strength_clip=1),
    "8": node("KSampler", model=["7", 0], steps=3),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    copy_modules(folder, "loaders.mjs")
    moved = [("CLIPLoader", {"clip_name": "a", "type": "wan", "device": "cpu"}), ("KSampler", {"steps": 1})]
    given = {"loaders": [*LOADERS, *moved], "back": OURS_ALONE, "prompts": [WORKFLOW]}
    return run_script(folder, "loaders.mjs", given, skipped="the conversion of loaders: it needs node")


def test_every_loader_comes_back_as_it_was(told):
    for (kind, values), there, again in zip(LOADERS, told["there"], told["again"], strict=False):
        assert there["type"].startswith("Spillway") and set(there["values"].values()) >= set(values.values()), kind
        assert again["type"] == kind and again["values"] == values


def test_what_has_no_counterpart_stays(told):
    assert told["there"][len(LOADERS) :] == [None, None], "a device of its own, and no loader"
    assert told["back"] == [None] * len(OURS_ALONE)


def test_a_workflow_with_comfyuis_loaders(told):
    (made,) = told["prompts"]
    assert list(made) == list(WORKFLOW)
    assert made["2"] == node("unCLIPCheckpointLoader", ckpt_name="a"), "its fourth output is used"
    assert made["4"] == node("UNETLoader", unet_name=["9", 0], weight_dtype="default")
    assert made["5"] == WORKFLOW["5"] and made["8"] == WORKFLOW["8"]
    assert made["6"] == node("DiffControlNetLoader", control_net_name="a", model=["4", 0])
    assert made["7"]["class_type"] == "LoraLoader" and made["7"]["inputs"] == WORKFLOW["7"]["inputs"]
