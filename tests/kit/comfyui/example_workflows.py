"""The example workflows as a page would queue them, and narrow files under the names that they ask for."""

import json
import os

import numpy as np
import torch
from safetensors.torch import load_file

from kit.comfyui import checkpoints
from kit.pack import ROOT

FOLDER = ROOT / "example_workflows"
NARROW_PACK = ROOT / "tests" / "kit" / "comfyui" / "narrow_pack"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")

TEXT_WIDTH = checkpoints.T5XXL_SMALL["d_model"]
FLUX = {"hidden": checkpoints.SMALL_USO, "depth": 1, "depth_single": 1, "context": TEXT_WIDTH, "pooled": 768}
SD15 = {"mult": (1,)}
# name -> (builder, its options), or what is written instead
FILES = {
    "flux1-dev.safetensors": ("flux", FLUX),
    "flux1-krea-dev_fp8_scaled.safetensors": ("flux", {**FLUX, "seed": 1}),
    "uso-flux1-projector-v1.safetensors": ("patch_uso", {"hidden": checkpoints.SMALL_USO}),
    "sigclip_vision_patch14_384.safetensors": ("siglip", {"small": False}),
    "flux1-redux-dev.safetensors": ("redux", {"width": TEXT_WIDTH}),
    "clip_l.safetensors": ("clip_l", {}),
    "t5xxl_fp16.safetensors": ("t5xxl_small", {}),
    "ae.safetensors": ("flux_vae", {}),
    "v1-5-pruned-emaonly-fp16.safetensors": ("sd15", SD15),
    "dreamshaper_8.safetensors": ("sd15", {**SD15, "seed": 1}),
    "sd_xl_base_1.0.safetensors": ("sd15", {**SD15, "seed": 2}),  # merged by names, which are those of SD 1.5
    "sd_xl_base_1.0_0.9vae.safetensors": ("sd15", {**SD15, "seed": 3}),
    "control_v11p_sd15_canny_fp16.safetensors": ("sd15_controlnet", SD15),
    "RealESRGAN_x4plus.safetensors": ("compact", {}),
    "wav2vec2_large_english_fp16.safetensors": ("wav2vec", {}),
}


def read(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def files_of(name):
    """{(folder of models, file)} that a workflow asks for."""
    nodes = read(name)["nodes"]
    return {(model["directory"], model["name"]) for one in nodes for model in one["properties"].get("models", [])}


def lay_out(base, names, checkpoint):
    """Put the files of workflows into a server's folder, and the pack with which it loads them."""
    base.joinpath("custom_nodes").mkdir()
    os.symlink(ROOT, base / "custom_nodes" / "ComfyUI-Spillway", target_is_directory=True)
    os.symlink(NARROW_PACK, base / "custom_nodes" / "narrow", target_is_directory=True)
    for folder, file in sorted({found for name in names for found in files_of(name)}):
        path = base / "models" / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if file in FILES:
            build, options = FILES[file]
            os.symlink(checkpoint(build, **options), path)
        elif folder == "loras":
            checkpoints.lora(path, checkpoint("sd15", **SD15), match="diffusion_model.")
        elif file.endswith(".ckpt"):
            # A checkpoint of a training, with what stands beside the weights there.
            beside = {"global_step": 840_000, "callbacks": {"best_model_score": np.float64(0.5)}}
            torch.save({"state_dict": load_file(checkpoint("sd15", **SD15)), **beside}, path)
        else:
            raise AssertionError(f"{file}: no narrow file of this name is known here.")


def prompt_of(name, server):
    """The prompt that a page makes of a workflow: nodes with their widgets' values in order, and links."""
    info, workflow = server.get("object_info"), read(name)
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for one in workflow["nodes"]:
        if one["type"] in NOTES:
            continue
        values, inputs = list(one.get("widgets_values") or []), {}
        known = info[one["type"]]["input"]
        for entry, spec in (*known.get("required", {}).items(), *known.get("optional", {}).items()):
            kind, extra = spec[0], spec[1] if len(spec) > 1 else {}
            if (isinstance(kind, list) or kind in WIDGETS) and not extra.get("forceInput"):
                inputs[entry] = values.pop(0)
                if extra.get("control_after_generate"):
                    values.pop(0)
        assert not values, f"{one['type']} has values too many: {values}"
        linked = {entry["name"]: sources[entry["link"]] for entry in one["inputs"] if entry["link"] is not None}
        prompt[str(one["id"])] = {"class_type": one["type"], "inputs": {**inputs, **linked}}
    return prompt
