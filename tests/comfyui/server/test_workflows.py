"""Example workflows as they are, on a real server: with small files of the names that they ask for."""

import copy
import os
import shutil

import comfy.utils
import numpy as np
import pytest

from kit.comfyui import checkpoints
from kit.comfyui.running_server import Server
from kit.comfyui.workflows import as_prompt, example
from kit.gguf_files import T5, quantised_copy, renamed, write_gguf
from kit.pack import ROOT

MINUTES = 15 * 60  # that a picture of 1024 x 1024 may take on a busy CPU
FLUX = {"hidden": 256, "depth": 1, "depth_single": 1, "context": 64, "pooled": 768}  # as wide as the text encoders
# A node pack of one file, which has ComfyUI build a narrow T5-XXL. Its own would take 9 GB.
NARROW_T5 = f"""
import comfy.sd

load_clip, CLIP = comfy.sd.load_clip, comfy.sd.CLIPType.STABLE_DIFFUSION


def narrow(ckpt_paths, embedding_directory=None, clip_type=CLIP, model_options=None, *others, **named):
    options = {{**{checkpoints.T5XXL_SMALL_OPTIONS!r}, **(model_options or {{}})}}
    return load_clip(ckpt_paths, embedding_directory, clip_type, options, *others, **named)


comfy.sd.load_clip = narrow
NODE_CLASS_MAPPINGS = {{}}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    base = tmp_path_factory.mktemp("workflows")
    (base / "custom_nodes").mkdir()
    os.symlink(ROOT, base / "custom_nodes" / "ComfyUI-Spillway", target_is_directory=True)
    (base / "custom_nodes" / "narrow_t5.py").write_text(NARROW_T5)
    for folder in ("diffusion_models", "text_encoders", "vae"):
        (base / "models" / folder).mkdir(parents=True)
    flux, t5 = checkpoint("flux", **FLUX), checkpoint("t5xxl_small")
    small = {
        "diffusion_models/flux1-dev": flux,
        "text_encoders/t5xxl_fp16": t5,
        "text_encoders/clip_l": checkpoint("clip_l"),
        "vae/ae": checkpoint("flux_vae"),
    }
    for name, path in small.items():
        shutil.copy(path, base / "models" / f"{name}.safetensors")
    in_blocks(base / "models" / "diffusion_models", "flux1-dev-Q4_K_S", flux, "Q4_K", "flux")
    in_blocks(base / "models" / "text_encoders", "t5-v1_1-xxl-encoder-Q5_K_M", t5, "Q5_K", "t5encoder", T5)
    with Server(base) as running:
        yield running


def in_blocks(folder, name, path, kind, architecture, names=()):
    """Write a GGUF file, and a safetensors file of the numbers that it stands for."""
    written, stands_for = quantised_copy(comfy.utils.load_torch_file(path), kind)
    checkpoints.write(folder / f"{name}.safetensors", stands_for)
    write_gguf(folder / f"{name}.gguf", renamed(written, names), {"general.architecture": architecture})


@pytest.fixture
def prompt_of(server):
    known = server.get("object_info")
    return lambda name: as_prompt(example(name), known)


def by_comfyui(prompt):
    """The same prompt with ComfyUI's loaders, files that are not in blocks, and models as they are."""
    plain = copy.deepcopy(prompt)
    theirs = {"SpillwayLoadDiffusionModel": "UNETLoader", "SpillwayLoadCLIP": "DualCLIPLoader"}
    for node in plain.values():
        node["class_type"] = {**theirs, "SpillwayLoadVAE": "VAELoader"}.get(node["class_type"], node["class_type"])
        for name, value in node["inputs"].items():
            if isinstance(value, str) and value.endswith(".gguf"):
                node["inputs"][name] = value.replace(".gguf", ".safetensors")
        if node["class_type"] == "SpillwayQuantiseModel":
            node["inputs"] |= {"weight_dtype": "default", "clip_dtype": "default"}
    return plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_dev_gguf", "flux_dev_quantise_model"])
def test_a_workflow_gives_comfyuis_picture(name, server, prompt_of):
    """On a machine with room for all, 'auto' leaves the weights as they are, and shows that it does."""
    prompt = prompt_of(name)
    (image,) = server.pictures(prompt, MINUTES).values()
    assert image.shape == (1024, 1024, 3) and image.std() > 1
    (wanted,) = server.pictures(by_comfyui(prompt), MINUTES).values()
    assert np.array_equal(image, wanted), f"{(image != wanted).mean():.1%} of the numbers differ"
