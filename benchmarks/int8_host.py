"""A whole model in INT8 in ComfyUI, with and without a LoRA, beside the core's patcher and ours; on the CPU.

    python dev.py bench int8_host                     # a Flux of 1.15 GB in bf16; needs about 17 GB of free RAM
    python dev.py bench int8_host --hidden 256        # a small one, to see that it runs
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench int8_host --json result.json

Runs in ComfyUI's own Python, found as for the host tests; on a CPU ComfyUI computes in fp32. Every contestant is a
process of its own and all of them take turns: each ratio is of two steps of the same round.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report as report
import torch
from _host import contestant_parser, find_host, start_core
from _pack import load_pack
from _race import Contestant, Laps, contest, race, read_into_cache, solo

CORE, OURS = "core", "Spillway"
FILE, LORA = "flux.safetensors", "lora.safetensors"
# Name: share of resident weights, what becomes of a LoRA (None: there is none).
QUANTISED: dict[str, tuple[float, str | None]] = {
    "INT8 100 %": (1.0, None),
    "INT8 50 %": (0.5, None),
    "INT8 0 %": (0.0, None),
    "INT8 100 %, LoRA merged": (1.0, "merge"),
    "INT8 100 %, LoRA beside": (1.0, "side branch"),
}
WITH_LORA = f"{OURS} + LoRA"
NAMES = (CORE, OURS, WITH_LORA, *QUANTISED)

# -- in ComfyUI's Python


def write_files(args: argparse.Namespace, laps: Laps) -> None:
    start_core(args.comfyui, args.base)
    import checkpoints

    with laps.lap("write"):
        path = checkpoints.flux(str(args.base / FILE), hidden=args.hidden, depth=2, depth_single=4)
        checkpoints.lora(str(args.base / LORA), path, rank=16)


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load, and one run of the core's sampler, which waits for its turn between the steps."""
    start_core(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils
    import sampling

    load_pack()
    from spillway.patcher.comfyui.loading.load import load_diffusion_model
    from spillway.patcher.policy import Policy

    name = args.contestant
    torch.set_num_threads(args.threads)
    path = str(args.base / FILE)
    with torch.inference_mode():
        with laps.lap("load"):
            if name == CORE:
                model: Any = comfy.sd.load_diffusion_model(path)
            elif name in QUANTISED:
                share, lora = QUANTISED[name]
                model = load_diffusion_model(path, "int8")
                total = model.dynamic.total_bytes
                kept: Any = lora or "auto"
                model.set_policy(Policy(vram_bytes=int(share * total), pinned_bytes=2 * total, int8_lora=kept))
            else:
                model = load_diffusion_model(path)
            if "LoRA" in name:
                weights = comfy.utils.load_torch_file(str(args.base / LORA))
                model, _ = comfy.sd.load_lora_for_models(model, None, weights, 0.5, 0)

        def after_step(step: int, *_: Any) -> None:
            laps.stop()
            laps.tell(words=[] if name == CORE else list(model.dynamic.ledger.decisions))
            if step + 1 < args.steps:
                laps.begin("step")

        laps.begin("first")
        latents = sampling.sample(model, steps=args.steps, width=args.size, height=args.size, callback=after_step)
        torch.save(latents, args.base / f"{name}.pt")


# -- in the parent


def summary(runs: Mapping[str, Contestant], folder: Path) -> dict[str, dict[str, Any]]:
    """By contestant: load and first step, medians of later ones, ratio to the core, and how near the latents are."""
    found = {}
    for name, run in runs.items():
        same_lora = WITH_LORA if "LoRA" in name else CORE
        latents, wanted = (torch.load(folder / f"{who}.pt").double().flatten() for who in (name, same_lora))
        found[name] = {
            "load_s": run.seconds("load")[0],
            "first_step_s": run.seconds("first")[0],
            "steps_s": report.median(run.seconds("step")[1:]),
            "gain_to_core": report.ratio(runs[CORE].seconds("step")[1:], run.seconds("step")[1:]),
            "cosine": float(torch.nn.functional.cosine_similarity(latents, wanted, dim=0)),
            "words": next((lap["words"] for lap in reversed(run.laps) if lap.get("words")), []),
        }
    return found


def parse() -> argparse.Namespace:
    parser = contestant_parser(__doc__, 2048, "2048 is 1.15 GB (default)")
    parser.add_argument("--size", type=int, default=512, help="pixels per side (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="later steps of each contestant, in turns")
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.steps = args.rounds + 2  # of one run of the sampler
    if args.contestant:
        return contest(lambda laps: (write_files if args.contestant == "write" else run_contestant)(args, laps))
    args.comfyui, python = find_host()

    def command(name: str) -> list[str]:
        told = ("--base", args.base, "--comfyui", args.comfyui, "--hidden", args.hidden, "--size", args.size)
        more = ("--rounds", args.rounds, "--threads", args.threads)
        return [str(part) for part in (python, __file__, "--contestant", name, *told, *more)]

    with tempfile.TemporaryDirectory(prefix="spillway-int8-") as folder:
        args.base = Path(folder)
        written = solo("write", command("write"), 1, args.threads)
        if written.failed is not None:
            sys.exit(f"the files could not be written: {written.failed}")
        nbytes = (args.base / FILE).stat().st_size
        read_into_cache(args.base / FILE)
        runs = race({name: command(name) for name in NAMES}, args.rounds, args.threads, settle=3)
        for run in runs.values():
            if run.failed is not None:
                sys.exit(f"{run.name} failed: {run.failed}")
        rows = summary(runs, args.base)
    words = f"{args.size} x {args.size}, {args.threads} threads, in ComfyUI, which computes in fp32"
    print(f"\nFlux, {nbytes / 1e9:.2f} GB in bf16; {words}\n")
    columns = ("", "load, s", "first step, s", "later step, s", "core's time / its own", "cosine")
    lines = [
        (
            name,
            report.number(row["load_s"]),
            report.number(row["first_step_s"]),
            report.number(row["steps_s"]),
            report.number(row["gain_to_core"]),
            f"{row['cosine']:.6f}",
        )
        for name, row in rows.items()
    ]
    print(report.table(columns, lines))
    if args.json:
        more = {"file_bytes": nbytes, "size": args.size, "host": report.host_versions(args.comfyui, python)}
        report.write(args.json, report.result(**more, results=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
