"""Popular packs beside 'manage every loader': they load, and their simplest graph gives the same picture as without.

SPILLWAY_PACKS names a folder with the folders of the packs. COMFYUI_PYTHON names a Python that has what they need.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from kit.comfyui.running_server import Server, node
from kit.gguf_files import quantised_copy, write_gguf
from kit.pack import ROOT
from kit.skips import skip_loudly

# What the log says of a model of Spillway's before its first use.
MANAGED = re.compile(r"\[Spillway\] .*bundles (?:may stay resident|\()")
PACKS = os.environ.get("SPILLWAY_PACKS", "")
FLUX = {"hidden": 256, "depth": 1, "depth_single": 1, "context": 768, "pooled": 768}  # as wide as CLIP-L


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    if not PACKS:
        skip_loudly("other packs beside 'manage every loader': SPILLWAY_PACKS names a folder that has them")
    import comfy.utils

    base = tmp_path_factory.mktemp("packs")
    files = {
        "diffusion_models/flux": checkpoint("flux", **FLUX),
        "checkpoints/sd15": checkpoint("sd15"),
        "checkpoints/again": checkpoint("sd15"),
        "text_encoders/clip": checkpoint("clip_l"),
        "vae/flux": checkpoint("flux_vae"),
        "vae/wan": checkpoint("wan_vae", dim=96),  # the pack knows no other
    }
    for name, path in files.items():
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path, base / "models" / f"{name}.safetensors")
    tensors = comfy.utils.load_torch_file(files["diffusion_models/flux"])
    blocks, _ = quantised_copy(tensors, "Q4_K")
    write_gguf(base / "models" / "diffusion_models" / "flux.gguf", blocks, {"general.architecture": "flux"})
    (base / "custom_nodes").mkdir()
    for pack in (ROOT, *sorted(path for path in Path(PACKS).iterdir() if path.is_dir())):
        os.symlink(pack, base / "custom_nodes" / pack.name, target_is_directory=True)
    with Server(base) as running:
        yield running


CONDITIONED = {
    "clip": node("CLIPLoader", clip_name="clip.safetensors", type="stable_diffusion"),
    "text": node("CLIPTextEncode", clip=["clip", 0], text="a red house by the sea"),
    "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    "vae": node("VAELoader", vae_name="flux.safetensors"),
}
SAMPLED = {"seed": 3, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


def flux(model, **changes):
    """A picture by the Flux that node `model` loads."""
    conds = {"positive": ["text", 0], "negative": ["text", 0]}
    return {
        **CONDITIONED,
        "model": model,
        "sampler": node("KSampler", model=["model", 0], latent_image=["latent", 0], **conds, **SAMPLED),
        "image": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["image", 0], filename_prefix="pack"),
        **changes,
    }


UNET = node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
CHECKPOINT = {
    "loader": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
    "text": node("CLIPTextEncode", clip=["loader", 1], text="a red house by the sea"),
    "latent": node("EmptyLatentImage", width=64, height=64, batch_size=1),
}
# Packs that keep models by the names of their files, and another name of the same file.
KEEPS_MODELS = {"ComfyUI-Easy-Use": {"ckpt_name": "again.safetensors"}}
# By pack: a graph with its nodes in it, and how many models of Spillway's the second run has.
GRAPHS = {
    "ComfyUI-KJNodes": (
        flux(
            node(
                "DiffusionModelLoaderKJ",
                model_name="flux.safetensors",
                weight_dtype="default",
                compute_dtype="default",
                patch_cublaslinear=False,
                sage_attention="disabled",
                enable_fp16_accumulation=False,
            ),
            vae=node("VAELoaderKJ", vae_name="flux.safetensors", device="main_device", weight_dtype="fp32"),
        ),
        3,
    ),
    "rgthree-comfy": (
        flux(
            UNET,
            power=node("Power Lora Loader (rgthree)", model=["model", 0], clip=["clip", 0]),
            text=node("CLIPTextEncode", clip=["power", 1], text="a red house by the sea"),
        ),
        3,
    ),
    "ComfyUI-Impact-Pack": (
        {
            **CHECKPOINT,
            "pipe": node(
                "ToBasicPipe",
                model=["loader", 0],
                clip=["loader", 1],
                vae=["loader", 2],
                positive=["text", 0],
                negative=["text", 0],
            ),
            "sampler": node("ImpactKSamplerBasicPipe", basic_pipe=["pipe", 0], latent_image=["latent", 0], **SAMPLED),
            "image": node("VAEDecode", samples=["sampler", 1], vae=["sampler", 2]),
            "save": node("SaveImage", images=["image", 0], filename_prefix="pack"),
        },
        3,
    ),
    "ComfyUI-GGUF": (flux(node("UnetLoaderGGUF", unet_name="flux.gguf")), 2),
    "ComfyUI-WanVideoWrapper": (
        {
            "wan": node("WanVideoVAELoader", model_name="wan.safetensors", precision="fp32"),
            "shown": node("PreviewAny", source=["wan", 0]),
        },
        0,
    ),
    "ComfyUI-Crystools": (
        flux(UNET, shown=node("Get resolution [Crystools]", image=["image", 0])),
        3,
    ),
    "ComfyUI_essentials": (
        flux(
            UNET,
            larger=node(
                "ImageResize+",
                image=["image", 0],
                width=96,
                height=96,
                interpolation="nearest",
                method="stretch",
                condition="always",
                multiple_of=0,
            ),
            save=node("SaveImage", images=["larger", 0], filename_prefix="pack"),
        ),
        3,
    ),
    "ComfyUI-Easy-Use": (
        {
            "loader": node(
                "easy comfyLoader",
                ckpt_name="sd15.safetensors",
                vae_name="Baked VAE",
                clip_skip=-1,
                lora_name="None",
                lora_model_strength=1.0,
                lora_clip_strength=1.0,
                resolution="width x height (custom)",
                empty_latent_width=64,
                empty_latent_height=64,
                positive="a red house by the sea",
                negative="",
                batch_size=1,
            ),
            "text": node("CLIPTextEncode", clip=["out", 6], text="a red house by the sea"),
            "out": node("easy pipeOut", pipe=["loader", 0]),
            "sampler": node(
                "KSampler",
                model=["loader", 1],
                positive=["out", 2],
                negative=["out", 3],
                latent_image=["out", 4],
                **SAMPLED,
            ),
            "image": node("VAEDecode", samples=["sampler", 0], vae=["loader", 2]),
            "save": node("SaveImage", images=["image", 0], filename_prefix="pack"),
        },
        3,
    ),
}


def ran_as(server, prompt, managed):
    """Run a prompt -> (its pictures, what the log said meanwhile)."""
    before = len(server.said())
    asked = {"prompt": prompt, "extra_data": {"spillway_manage": managed}}
    status, body = server.ask("prompt", json.dumps(asked).encode())
    assert status == 200, body.decode()
    number = json.loads(body)["prompt_id"]
    history = server.wait(lambda: server.get(f"history/{number}").get(number), 240)
    assert history["status"]["status_str"] == "success", json.dumps(history["status"]["messages"][-1])[:3000]
    return server.pictures_of(history), server.said()[before:]


@pytest.mark.slow
@pytest.mark.parametrize("pack", GRAPHS)
def test_a_pack_loads_and_its_simplest_graph_gives_the_same_picture(pack, server):
    if not (Path(PACKS) / pack).is_dir():
        pytest.skip(f"{PACKS} has no {pack}")
    failed = [line for line in server.said().splitlines() if "(IMPORT FAILED)" in line and line.endswith(pack)]
    assert not failed, server.said()
    graph, count = GRAPHS[pack]
    wanted, said = ran_as(server, graph, False)
    assert not MANAGED.findall(said)
    if pack in KEEPS_MODELS:
        _, said = ran_as(server, graph, True)
        assert not MANAGED.findall(said) and "as another pack keeps them in a cache of its own" in said
        graph = {**graph, "loader": {**graph["loader"], "inputs": {**graph["loader"]["inputs"], **KEEPS_MODELS[pack]}}}
    got, said = ran_as(server, graph, True)
    assert set(got) == set(wanted) and all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert "left to ComfyUI" not in said
    assert len(MANAGED.findall(said)) == count, said
