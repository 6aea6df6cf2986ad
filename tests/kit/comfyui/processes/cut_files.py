"""Cut or overwrite a file between its opening and each kind of reading. Print {reader: what came of it} as JSON.

cut_files.py COMFYUI PACK BASE FOLDER WHAT
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

comfyui, pack, base, folder, what = sys.argv[1:]
sys.path[:0] = [comfyui, f"{pack}/tests"]

import comfy.cli_args

comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = base

import folder_paths
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave

import kit.pack  # noqa: F401 - makes the package `spillway`
from kit.comfyui import sampling
from spillway.ops.files import probe as probing
from spillway.ops.files.disk_map import DiskMap
from spillway.patcher.comfyui.loading import load, loader_overrides
from spillway.patcher.comfyui.loading.probe import comfyui_name, probe_file
from spillway.patcher.comfyui.saving.extract_lora import save_lora
from spillway.patcher.comfyui.saving.save import save_model
from spillway.patcher.policy import Policy

folder = Path(folder)
folder_paths.set_output_directory(str(folder / "out"))
LEAST = Policy(vram_bytes=0, pinned_bytes=0)


def change(path):
    if what == "cut":
        os.truncate(path, 4096)
    else:
        with open(path, "r+b") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            file.write(bytes(os.path.getsize(path) - file.tell()))
    time.sleep(0.005)  # files are checked once a millisecond


def once(path):
    """Make a function that changes the file the first time that it is called."""
    left = [path]
    return lambda *_, **__: change(left.pop()) if left else None


def opened(read):
    """Change the file right after it was opened, while `read` goes on."""

    def run(path):
        own, now = DiskMap.state_dict, once(path)
        DiskMap.state_dict = lambda disk_map: (own(disk_map), now())[0]
        try:
            read(path)
        finally:
            DiskMap.state_dict = own

    return run


def of_formats(path):
    """The formats of quantised layers are read before anything else."""
    own, now = loader_overrides.check_quantised, once(path)
    loader_overrides.check_quantised = lambda source: (now(), own(source))[1]
    try:
        load.load_diffusion_model(path)
    finally:
        loader_overrides.check_quantised = own


def of_header(path):
    own, now = probing.read_header, once(path)
    probing.read_header = lambda given: (now(), own(given))[1]
    try:
        probe_file(path)
    finally:
        probing.read_header = own


def model(path):
    return load.load_diffusion_model(path, policy=LEAST)


def saving(path):
    """In the middle of a tensor."""
    save_model(str(folder / "out" / "x_00001_.safetensors"), model(path), progress=lambda done, _: done and now())


def extracting(path):
    tuned, base = model(path), model(str(folder / "base.safetensors"))
    save_lora(str(folder / "out" / "l_00001_.safetensors"), tuned, base, 4, progress=lambda done, _: done and now())


def merging(path):
    merged = ModelMergeSimple().merge(model(str(folder / "base.safetensors")), model(path), 0.5)[0]
    save_model(str(folder / "out" / "m_00001_.safetensors"), merged, progress=lambda done, _: done and now())


def running(path):
    loaded = model(path)
    sampling.sample(loaded, steps=2, width=32, height=32, callback=lambda *_: now())


def by_comfyui(path):
    loaded = model(path)
    now()
    ModelSave().save(loaded, "comfyui")


READERS = {
    "load_diffusion_model": (opened(load.load_diffusion_model), "flux"),
    "load_int8": (opened(lambda path: load.load_diffusion_model(path, "int8")), "flux"),
    "load_clip": (opened(lambda path: load.load_clip([path])), "clip"),
    "load_vae": (opened(load.load_vae), "vae"),
    "load_checkpoint": (opened(load.load_checkpoint), "checkpoint"),
    "comfyui_name": (opened(comfyui_name), "flux"),
    "formats": (of_formats, "quantised"),
    "header": (of_header, "flux"),
    "run": (running, "flux"),
    "save": (saving, "flux"),
    "extract": (extracting, "flux"),
    "merge": (merging, "flux"),
    "ComfyUI's save": (by_comfyui, "flux"),
}

said = {}
(folder / "out").mkdir()
with torch.inference_mode():
    for name, (read, kind) in READERS.items():
        path = shutil.copy(folder / f"{kind}.safetensors", str(folder / "changes.safetensors"))
        now = once(path)
        print(name, file=sys.stderr, flush=True)
        try:
            read(path)
            said[name] = "done"
        except Exception as error:
            said[name] = f"{type(error).__name__} {error}"
        os.unlink(path)
print(json.dumps({"said": said, "left": sorted(os.listdir(folder / "out"))}))
