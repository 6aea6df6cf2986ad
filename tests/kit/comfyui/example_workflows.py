"""The example workflows as a page would queue them, and narrow files under the names that they ask for."""

import functools
import json
import os

import numpy as np
import torch
from safetensors.torch import load_file

from kit.comfyui import checkpoints
from kit.gguf_files import T5, quantised_copy, renamed, write_gguf
from kit.pack import ROOT

FOLDER = ROOT / "example_workflows"
NARROW_PACK = ROOT / "tests" / "kit" / "comfyui" / "narrow_pack"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")

TEXT_WIDTH = checkpoints.T5XXL_SMALL["d_model"]
QWEN_WIDTH = checkpoints.SMALL_LLAMAS["qwen3_4b"][1]["hidden_size"]
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
    "flux1-schnell.safetensors": ("flux", {**FLUX, "guidance": False, "seed": 4}),
    "vae-ft-mse-840000-ema-pruned.safetensors": ("sd_vae", {}),
    "z_image_turbo_bf16.safetensors": ("z_image", {"context": QWEN_WIDTH}),
    "qwen_3_4b.safetensors": ("small_llama", {"name": "qwen3_4b"}),
}
# name -> (the file of FILES that is in it in blocks, their kind, the architecture that it names, its names of tensors)
IN_BLOCKS = {
    "flux1-dev-Q4_K_S.gguf": ("flux1-dev.safetensors", "Q4_K", "flux", ()),
    "t5-v1_1-xxl-encoder-Q5_K_M.gguf": ("t5xxl_fp16.safetensors", "Q5_K", "t5encoder", T5),
}
FLUX_LORAS = {
    f"{name}.safetensors"
    for name in ("Hyper-FLUX.1-dev-8steps-lora", "art_lora_comfy_converted", "realism_lora_comfy_converted")
}
ALL = sorted(path.stem for path in FOLDER.glob("*.json"))
# What makes a run short. It leaves every node and link as it is.
FEW_STEPS, SMALL, TINY = 2, 128, {"EmptyImage", "EmptyLatentImage", "EmptySD3LatentImage"}


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
        elif file in IN_BLOCKS:
            source, kind, architecture, called = IN_BLOCKS[file]
            build, options = FILES[source]
            written, _ = quantised_copy(load_file(checkpoint(build, **options)), kind)
            write_gguf(path, renamed(written, called), {"general.architecture": architecture})
        elif file in FLUX_LORAS:
            checkpoints.lora(path, checkpoint("flux", **FLUX), match="blocks.")
        elif folder == "loras":
            checkpoints.lora(path, checkpoint("sd15", **SD15), match="diffusion_model.")
        elif file.endswith(".ckpt"):
            # A checkpoint of a training, with what stands beside the weights there.
            beside = {"global_step": 840_000, "callbacks": {"best_model_score": np.float64(0.5)}}
            torch.save({"state_dict": load_file(checkpoint("sd15", **SD15)), **beside}, path)
        else:
            raise AssertionError(f"{file}: no narrow file of this name is known here.")


@functools.cache
def nodes_of(server):
    """What a server says of its nodes, asked once. Their inputs stay what they are."""
    return server.get("object_info")


def prompt_of(name, server):
    """The prompt that a page makes of a workflow: nodes with their widgets' values in order, and links."""
    info, workflow = nodes_of(server), read(name)
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


def in_short(prompt):
    """The same prompt with few steps and a small picture."""
    for one in prompt.values():
        inputs = one["inputs"]
        if one["class_type"] in TINY:
            inputs |= {"width": SMALL, "height": SMALL}
        if isinstance(inputs.get("steps"), int):
            inputs["steps"] = min(inputs["steps"], FEW_STEPS)
    return prompt
