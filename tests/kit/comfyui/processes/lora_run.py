"""Run a model once, with a LoRA or with it as a hook.

lora_run.py COMFYUI PACK BASE MODEL LORA OPTIONS. OPTIONS, in JSON: budget (bytes), dtype (as in the loader node),
pinned (bytes), lora (strength), hook (strength), steps, classic (run ComfyUI's classic patcher instead). Prints JSON:
the digest of the latents, and by how many bytes the process grew at most.
"""

import hashlib
import json
import runpy
import sys

comfyui, pack, base, path, lora_path, options = sys.argv[1:]
options = json.loads(options)
sys.path[:0] = [comfyui, f"{pack}/tests"]

runpy.run_path(f"{pack}/prestartup_script.py")  # as ComfyUI does: before torch

import comfy.cli_args

comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = base

import comfy.hooks
import comfy.sd
import comfy.utils
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from kit.comfyui import sampling
from spillway.patcher.comfyui.loading.load import WEIGHT_DTYPES, load_diffusion_model
from spillway.patcher.policy import Policy


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def main():
    torch.set_num_threads(2)
    torch.nn.Linear(64, 64)(torch.ones(8, 64))  # what torch itself needs
    if options.get("classic"):
        model = comfy.sd.load_diffusion_model(path, model_options=dict(WEIGHT_DTYPES[options["dtype"]]))
    else:
        policy = Policy(vram_bytes=options["budget"], pinned_bytes=options.get("pinned", 0))
        model = load_diffusion_model(path, options["dtype"], policy)
    lora = comfy.utils.load_torch_file(lora_path)
    if "lora" in options:
        model = comfy.sd.load_lora_for_models(model, None, lora, options["lora"], 0)[0]
    positive, negative = sampling.conds(model)
    if "hook" in options:
        hooks = comfy.hooks.create_hook_lora(lora, options["hook"], 0)
        (positive,) = comfy.hooks.set_conds_props([positive], 1.0, "default", hooks=hooks)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    cond = (positive, negative)
    latents = sampling.sample(model, steps=options["steps"], width=32, height=32, cfg=2.0, cond=cond)
    grown = status("VmHWM") - before
    assert latents.isfinite().all()
    print(json.dumps({"digest": hashlib.sha256(latents.numpy().tobytes()).hexdigest(), "grown": grown}))


with torch.inference_mode():
    main()
