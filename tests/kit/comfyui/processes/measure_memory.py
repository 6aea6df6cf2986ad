"""Measure what loading, running and dropping a model with a budget of `vram` bytes takes of RAM. Prints JSON."""

import gc
import json
import runpy
import sys
import time

comfyui, pack, base, big, small, vram = sys.argv[1:]
sys.path[:0] = [comfyui, f"{pack}/tests"]

runpy.run_path(f"{pack}/prestartup_script.py")  # as ComfyUI does: before torch

import comfy.cli_args

comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = base

import comfy.model_management as mm
import psutil
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from kit.comfyui import sampling
from spillway.nodes.load import SpillwayLoadDiffusionModel
from spillway.patcher.policy import Policy

MB = 1e6
BUDGET = int(vram)
process = psutil.Process()


def rss():
    gc.collect()
    return process.memory_info().rss / MB


def load(name):
    policy = Policy(vram_bytes=BUDGET)
    started = time.perf_counter()
    (model,) = SpillwayLoadDiffusionModel.execute(unet_name=name, weight_dtype="default", policy=policy).args
    return model, time.perf_counter() - started


def step(model):
    assert sampling.sample(model, steps=2, width=32, height=32, cond=sampling.conds(model)).isfinite().all()


with torch.inference_mode():
    model, _ = load(small)  # what every process needs once: kernels, threads, caches of ComfyUI
    step(model)
    del model
    mm.unload_all_models()
    out = {"before": rss()}
    model, first = load(big)
    out["loaded"] = rss()
    size = model.model_size()
    del model
    model, second = load(big)
    step(model)
    out |= {"seconds": [first, second], "size": size / MB, "stepped": rss(), "peak": model.dynamic.peak_resident_bytes}
    out["resident"] = model.loaded_size()
    mm.unload_all_models()
    out |= {"unloaded": rss(), "resident after": model.loaded_size(), "budget": BUDGET}
    del model
    out["dropped"] = rss()
print(json.dumps(out))
