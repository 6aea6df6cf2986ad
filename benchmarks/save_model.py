"""Saving a model with a LoRA on every layer: the core's ModelSave, Spillway's node, and a plain copy of the same bytes.

    python dev.py bench save_model                          # a 2 GB Flux in bf16; the core needs 15 GB of free RAM
    python dev.py bench save_model --depth 8 --no-core      # 6 GB, without the core, which would need 45 GB
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench save_model --json result.json

Runs in ComfyUI's own Python, found as for the host tests. Each contestant is a process of its own, and each round runs
all of them in turns. What is timed ends when the bytes are on the disk (fsync), for all. Memory is the largest resident
set while saving, less that before it, sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report as report
import psutil
import torch
from _host import contestant_parser, find_host, start_core
from _pack import load_pack
from _race import Laps, contest, read_into_cache, solo
from host_loader import CONTEXT, FILE, POOLED

CORE, PLAIN, COPY = "core ModelSave", "Spillway, no LoRA", "plain copy"
OURS = {"Spillway": "as loaded", "Spillway, fp8": "fp8_e4m3fn scaled", "Spillway, int8": "int8_tensorwise"}
COPY_BUFFER = 8 << 20
LORA = "lora.safetensors"
RANK = 16

# -- in ComfyUI's Python


def write_model(args: argparse.Namespace) -> dict[str, Any]:
    start_core(args.comfyui, args.base)
    import checkpoints

    path = args.base / "models" / "diffusion_models" / FILE
    checkpoints.flux(str(path), hidden=args.hidden, depth=args.depth, context=CONTEXT, pooled=POOLED)
    checkpoints.lora(str(args.base / LORA), str(path), rank=RANK)
    entries = checkpoints.read_header(path).values()
    sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries]
    return {"file_bytes": path.stat().st_size, "largest_tensor_bytes": max(sizes)}


def model_of(args: argparse.Namespace) -> Any:
    import comfy.sd
    import comfy.utils
    import nodes

    if args.contestant == CORE:
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
        return lambda: copy_file(args.base / "models" / "diffusion_models" / FILE, args.base / "output" / "copy")
    start_core(args.comfyui, args.base)
    torch.set_num_threads(args.threads)
    model = model_of(args)
    if args.contestant == CORE:
        from comfy_extras.nodes_model_merging import ModelSave

        def save_and_sync() -> None:
            ModelSave().save(model, "saved/core")
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


class PeakMemory:
    """The largest resident set while it is open, less that before."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def growth(self) -> int:
        return self._peak - self._before


def run_contestant(args: argparse.Namespace) -> dict[str, Any]:
    with torch.inference_mode():
        save = saver_of(args)
        with PeakMemory() as memory:
            begun, begun_cpu = time.perf_counter(), time.process_time()
            save()
            seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
    files = [path for path in (args.base / "output").rglob("*") if path.is_file()]
    nbytes = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_growth_bytes": memory.growth, "bytes": nbytes}


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
    """Medians over the rounds; the speed is bytes in a second to those of the copy in the same round."""
    found = {}
    for name in rounds[0]:
        entries = [one[name] for one in rounds]
        found[name] = {key: report.median([entry[key] for entry in entries]) for key in entries[0]}
        found[name]["speed_ratio"] = report.median(
            [one[name]["bytes"] / one[name]["seconds"] / (one[COPY]["bytes"] / one[COPY]["seconds"]) for one in rounds]
        )
        found[name]["peak_growth_bytes"] = max(entry["peak_growth_bytes"] for entry in entries)
    return found


def parse() -> argparse.Namespace:
    parser = contestant_parser(__doc__, 3072, "3072 is 2.05 GB at a depth of 2 (default)")
    parser.add_argument("--depth", type=int, default=2, help="double blocks: 2 make 2.05 GB (default), 8 make 6.1 GB")
    parser.add_argument("--rounds", type=int, default=3, help="times that each saves (default %(default)s)")
    parser.add_argument("--no-core", action="store_true", help="leave the core's node out")
    return parser.parse_args()


def as_contestant(args: argparse.Namespace, laps: Laps) -> None:
    laps.begin("save")
    laps.tell(facts=write_model(args) if args.contestant == "write" else run_contestant(args))
    laps.stop()


def main() -> int:
    args = parse()
    if args.contestant:
        return contest(lambda laps: as_contestant(args, laps))
    args.comfyui, python = find_host()

    def outcome(name: str) -> dict[str, Any]:
        told = ("--base", args.base, "--comfyui", args.comfyui, "--hidden", args.hidden, "--depth", args.depth)
        command = [str(part) for part in (python, __file__, "--contestant", name, *told, "--threads", args.threads)]
        run = solo(name, command, 1, args.threads)
        if run.failed is not None:
            sys.exit(f"{name} failed: {run.failed}")
        facts: dict[str, Any] = run.last()["facts"]
        return facts

    names = [COPY, PLAIN, *OURS, *(() if args.no_core else (CORE,))]
    rounds = []
    with tempfile.TemporaryDirectory(prefix="spillway-save-") as folder:
        args.base = Path(folder)
        for part in ("models/diffusion_models", "output"):
            (args.base / part).mkdir(parents=True)
        about = outcome("write")
        for number in range(args.rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            found = {}
            for name in order:
                read_into_cache(args.base / "models" / "diffusion_models" / FILE)
                found[name] = outcome(name)
                print(f"round {number + 1} of {args.rounds}: {name} done", file=sys.stderr)
            rounds.append({name: found[name] for name in names})
    results = summary(rounds)
    limit = 2 * about["largest_tensor_bytes"] + (64 << 20)
    print(f"\nFlux, {about['file_bytes'] / 1e9:.2f} GB in bf16, a LoRA of rank {RANK} on every layer, ", end="")
    print(f"{args.threads} threads; twice the largest tensor and 64 MiB are {limit / 1e6:,.0f} MB\n")
    print(table(results))
    if args.json:
        more = {**about, "memory_limit_bytes": limit, "host": report.host_versions(args.comfyui, python)}
        report.write(args.json, report.result(**more, results=results, rounds=rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
