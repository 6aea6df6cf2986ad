"""Save files, in a process that tests kill, or give a disk that is full or read-only.

save_files.py forever FOLDER            saves FOLDER/model.safetensors again and again, each time larger
save_files.py full FOLDER               FOLDER lies on a file system of 4 MiB, which fills while it saves
save_files.py once FOLDER               saves FOLDER/model.safetensors, of 2 MiB
save_files.py counted FOLDER            saves 15 files under the next number that it sees, each full of its process's id
"""

import contextlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from spillway.ops.files.deferred import Deferred, Made, Stored
from spillway.ops.files.safetensors_writer import SaveError
from spillway.ops.files.save_pipeline import save

MIB = 1 << 20


def tensors(mib):
    """`mib` tensors of 1 MiB, the n-th full of n."""
    shape = (512, 512)
    return {
        f"t{index}": Deferred.of(Made(lambda index=index: torch.full(shape, float(index))), shape, torch.float32)
        for index in range(mib)
    }


def forever(folder):
    for _ in sys.stdin:
        child = os.fork()  # nothing has been computed, so torch has no threads yet that a fork would lose
        if child == 0:
            save_until_killed(folder)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("killed", flush=True)


def save_until_killed(folder):
    size = 0
    while True:
        size = size % 40 + 1
        save(
            folder / "model.safetensors",
            tensors(size),
            {"size": str(size)},
            overwrite=True,
            journal=folder / "journal",
        )


def full(folder):
    def fill(done, total):
        if done == MIB:
            with contextlib.suppress(OSError), open(folder / "other", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(MIB))

    save(folder / "model.safetensors", tensors(1))
    before = (folder / "model.safetensors").read_bytes()
    said = []
    for mib, progress in ((64, lambda *_: None), (4, fill)):
        try:
            save(folder / "model.safetensors", tensors(mib), progress=progress, overwrite=True)
            said.append("saved")
        except SaveError as error:
            said.append(str(error))
    same = (folder / "model.safetensors").read_bytes() == before
    return {"said": said, "same": same, "files": sorted(path.name for path in folder.iterdir())}


def once(folder):
    try:
        save(folder / "model.safetensors", {"x": Deferred.of(Stored(torch.ones(MIB // 2)), (MIB // 2,), torch.float32)})
        return {"said": "saved"}
    except SaveError as error:
        return {"said": str(error)}


def counted(folder):
    """As two servers do: the number is chosen when a save begins. A line on the input starts it."""
    mine = torch.full((1000,), float(os.getpid()))
    print("ready", flush=True)
    sys.stdin.readline()
    paths = []
    for _ in range(15):
        number = max([int(name.split("_")[1]) for name in os.listdir(folder) if name.startswith("model_")], default=0)
        path = folder / f"model_{number + 1:05}_.safetensors"
        written = save(
            path, {"x": Deferred.of(Stored(mine), (1000,), torch.float32)}, counted=True, journal=folder / "journal"
        )
        paths.append(written.path.name)
    return {"pid": os.getpid(), "paths": paths}


if __name__ == "__main__":
    print(
        json.dumps({"forever": forever, "full": full, "once": once, "counted": counted}[sys.argv[1]](Path(sys.argv[2])))
    )
