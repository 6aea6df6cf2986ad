"""Run models, do something to their file, run and save them again. Print what came of it, one JSON line for each model.

file_changes.py FILE DEVICE WHAT

WHAT happens to the file, between two steps and in the middle of one, with all, half and none of the weights resident.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from kit.nets import Stack, dynamic, same
from kit.sim_device import SimDevice
from spillway.ops.files.deferred import Deferred, Stored
from spillway.ops.files.disk_map import SourceError
from spillway.ops.files.save_pipeline import save
from spillway.patcher.policy import Policy


def change(path, what):
    if what == "cut":
        os.truncate(path, 4096)
    elif what.startswith("overwritten"):
        before = path.stat()
        with open(path, "r+b") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            file.write(bytes(os.path.getsize(path) - file.tell()))
        if what == "overwritten, its time set back":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif what == "replaced":
        path.with_suffix(".new").write_bytes(bytes(100))
        os.replace(path.with_suffix(".new"), path)
    else:
        path.unlink()
    time.sleep(0.005)  # resident weights are checked once a millisecond


def outcomes(path, device, what, fraction, when):
    model = dynamic(Stack, path, device=SimDevice() if device == "sim" else None)
    model.set_policy(Policy(vram_bytes=int(fraction * model.total_bytes), pinned_bytes=0))
    x = model.module.input()
    wanted = model(x)
    model.free()  # what is resident is brought again
    if when == "between":
        change(path, what)
    else:
        middle = model.module.layers[len(model.module.layers) // 2]
        hook = middle.register_forward_hook(lambda *_: (hook.remove(), change(path, what))[0])

    def write():
        weights = {param.key: param.source for bundle in model.bundles for param in bundle.params}
        save(
            path.with_suffix(".saved"), {k: Deferred.of(Stored(t), tuple(t.shape), t.dtype) for k, t in weights.items()}
        )
        return "done"

    def run():
        return "same" if same(model(x), wanted) else "other"

    said = {}
    for name, attempt in {"run": run, "run again": run, "save": write}.items():
        try:
            said[name] = attempt()
        except SourceError as error:
            said[name] = f"{type(error).__name__} {error}"
    said["left"] = [entry.name for entry in path.parent.iterdir() if entry != path]
    return said


def main(original, device, what):
    for fraction in (1.0, 0.5, 0.0):
        for when in ("between", "middle"):
            folder = Path(original).parent / f"{fraction} {when}"
            folder.mkdir()
            path = Path(shutil.copy(original, folder / "model.safetensors"))
            print(json.dumps([f"{fraction} {when}", outcomes(path, device, what, fraction, when)]), flush=True)


torch.set_grad_enabled(False)
main(*sys.argv[1:])
