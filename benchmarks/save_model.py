"""Saving a model with a LoRA on every layer: ComfyUI's ModelSave, Spillway's node, and a plain copy of the same bytes.

    python dev.py bench save_model                          # a 2 GB Flux in bf16; ComfyUI's needs 15 GB of RAM
    python dev.py bench save_model --depth 8 --no-comfyui   # 6 GB, without ComfyUI's node, which would need 45 GB
    python dev.py bench save_model --only w4a8 --only nvfp4 # those whose names have one of these in them, and the copy
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench save_model --json result.json

Runs in ComfyUI's own Python, found as for its tests. Each contestant is a process of its own, and each round runs
all of them in turns. What is timed ends when the bytes are on the disk (fsync), for all. Memory is the largest resident
set while saving, less that before it, sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from comfyui_loader import CONTEXT, FILE, POOLED, model_path

from harness import comfyui, report
from harness.laps import Laps
from harness.memory import Peak
from harness.pack import load_pack
from harness.race import must_have_run, read_into_cache, solo
from harness.turns import rotated

COMFYUI, PLAIN, COPY = "ComfyUI ModelSave", "Spillway, no LoRA", "plain copy"
OURS = {
    "Spillway": "as loaded",
    "Spillway, fp8": "fp8_e4m3fn scaled",
    "Spillway, int8": "int8_tensorwise",
    "Spillway, int8_convrot": "int8_convrot",
    "Spillway, mxfp8": "mxfp8",
    "Spillway, w4a8": "w4a8",
    "Spillway, nvfp4": "nvfp4",
}
COPY_BUFFER = 8 << 20
LORA = "lora.safetensors"
RANK = 16
KEYS = ("seconds", "cpu_seconds", "peak_growth_bytes", "bytes")

# -- in ComfyUI's Python


def write_model(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    from kit.comfyui import checkpoints

    path = model_path(args.base)
    with laps.lap("write"):
        path.parent.mkdir(parents=True)
        (args.base / "output").mkdir()
        checkpoints.flux(str(path), hidden=args.hidden, depth=args.depth, context=CONTEXT, pooled=POOLED)
        checkpoints.lora(str(args.base / LORA), str(path), rank=RANK)


def model_of(args: argparse.Namespace) -> Any:
    import comfy.sd
    import comfy.utils
    import nodes

    if args.contestant == COMFYUI:
        model = nodes.UNETLoader().load_unet(FILE, "default")[0]
    else:
        load_pack()
        from spillway.nodes.load import SpillwayLoadDiffusionModel

        model = SpillwayLoadDiffusionModel.execute(FILE, "default").result[0]
    if args.contestant == PLAIN:
        return model
    lora = comfy.utils.load_torch_file(str(args.base / LORA))
    return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]


def saver_of(args: argparse.Namespace) -> Any:
    if args.contestant == COPY:
        return lambda: copy_file(model_path(args.base), args.base / "output" / "copy")
    comfyui.start_comfyui(args.comfyui, args.base)
    torch.set_num_threads(args.threads)
    model = model_of(args)
    if args.contestant == COMFYUI:
        from comfy_extras.nodes_model_merging import ModelSave

        def save_and_sync() -> None:
            ModelSave().save(model, "saved/comfyui")
            for path in (args.base / "output" / "saved").iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

        return save_and_sync
    from spillway.nodes.save import SpillwaySaveDiffusionModel

    dtype = OURS.get(args.contestant, "as loaded")
    return lambda: SpillwaySaveDiffusionModel.execute(model, "saved/ours", dtype)


def copy_file(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as written:
        while data := read.read(COPY_BUFFER):
            written.write(data)
        written.flush()
        os.fsync(written.fileno())


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    process = psutil.Process()
    with torch.inference_mode():
        save = saver_of(args)
        laps.begin("save")
        with Peak(lambda: process.memory_info().rss, interval=0.002) as rss:
            save()
        laps.stop()
    files = [path for path in (args.base / "output").rglob("*") if path.is_file()]
    nbytes = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    laps.tell(peak_growth_bytes=rss.peak - rss.begun, bytes=nbytes)


# -- in the parent


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            name,
            report.megabytes(found["bytes"]),
            report.number(found["seconds"]),
            report.number(found["cpu_seconds"]),
            report.number(found["bytes"] / 1e6 / found["seconds"], "{:,.0f}"),
            report.number(found["speed_ratio"]),
            report.megabytes(found["peak_growth_bytes"]),
        )
        for name, found in results.items()
    ]
    columns = ("", "written, MB", "s", "CPU, s", "MB/s", "speed to a copy's", "peak RSS growth, MB")
    return report.table(columns, rows)


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return medians over the rounds. The speed is bytes in a second to those of the copy in the same round."""
    found = {}
    for name in rounds[0]:
        entries = [one[name] for one in rounds]
        found[name] = {key: report.median([entry[key] for entry in entries]) for key in entries[0]}
        found[name]["speed_ratio"] = report.median(
            [one[name]["bytes"] / one[name]["seconds"] / (one[COPY]["bytes"] / one[COPY]["seconds"]) for one in rounds]
        )
        found[name]["peak_growth_bytes"] = max(entry["peak_growth_bytes"] for entry in entries)
    return found


def largest_tensor(path: Path) -> int:
    """Return the bytes of a file's largest tensor."""
    load_pack()
    from spillway.ops.files.disk_map import DiskMap

    source = DiskMap(path)
    return max(source.spec(key).nbytes for key in source.keys())  # noqa: SIM118 - no mapping


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    path = model_path(args.base)
    others = [PLAIN, *OURS, *(() if args.no_comfyui else (COMFYUI,))]
    names = [COPY, *(name for name in others if not args.only or any(part in name for part in args.only))]
    rounds = []
    for number in range(args.rounds):
        laps = {}
        for name in rotated(names, number):
            read_into_cache(path)
            run = solo(name, command(name), 1, args.threads)
            must_have_run(run)
            laps[name] = {key: run.last()[key] for key in KEYS}
            print(f"round {number + 1} of {args.rounds}: {name} done", file=sys.stderr)
        rounds.append({name: laps[name] for name in names})
    rows = summary(rounds)
    sizes = {"file_bytes": path.stat().st_size, "largest_tensor_bytes": largest_tensor(path)}
    limit = 2 * sizes["largest_tensor_bytes"] + (64 << 20)
    about = (
        f"Flux, {sizes['file_bytes'] / 1e9:.2f} GB in bf16, a LoRA of rank {RANK} on every layer, {args.threads} "
        f"threads; twice the largest tensor and 64 MiB are {limit / 1e6:,.0f} MB"
    )
    return comfyui.Outcome(
        (about, table(rows)), {**sizes, "memory_limit_bytes": limit, "results": rows, "rounds": rounds}
    )


def main() -> int:
    parser = comfyui.parser(__doc__)
    comfyui.add_flux(parser, 3072, "3072 is 2.05 GB at a depth of 2 (default)")
    parser.add_argument("--depth", type=int, default=2, help="double blocks: 2 make 2.05 GB (default), 8 make 6.1 GB")
    parser.add_argument("--rounds", type=int, default=3, help="times that each saves (default %(default)s)")
    parser.add_argument("--no-comfyui", action="store_true", help="leave ComfyUI's node out")
    parser.add_argument("--only", action="append", default=[], help="only those whose names have this in them")
    return comfyui.run(parser.parse_args(), run_contestant, measure, write=write_model)


if __name__ == "__main__":
    sys.exit(main())
