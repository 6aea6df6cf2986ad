"""The demo: a gigabyte-sized Flux model denoised in a quarter of its size, compared bit for bit with the loaded model.

    python benchmarks/demo/run.py                        # makes the model, runs twice, prints a table, draws a picture
    python benchmarks/demo/run.py --budget 0.1 --json result.json
    python benchmarks/demo/run.py --comfyui ~/ComfyUI    # the same model in a real ComfyUI, over its HTTP interface

The exit status is 0 only if both runs gave the same bits and the resident weights stayed within the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo import picture, report
from demo.checkpoint import CACHE, DEFAULT_GB, MAX_GB, MIN_GB, ensure_checkpoint
from demo.comfyui import graph
from demo.sampling import DEFAULT_SIZE, TOKEN_PIXELS

MEASURE = Path(__file__).resolve().parent / "measure.py"
DECISIONS_SHOWN = 12


def best_device() -> str:
    """Return the fastest kind of device that torch can use here."""
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def run_child(name: str, folder: Path, args: argparse.Namespace, checkpoint: Path, budget: float | None) -> dict:
    """Measure one run in a fresh process; return its figures, with the latents under ``latents``."""
    command = [sys.executable, str(MEASURE), "--name", name, "--folder", str(folder), "--checkpoint", str(checkpoint)]
    command += ["--device", args.device, "--steps", str(args.steps), "--size", str(args.size), "--seed", str(args.seed)]
    if budget is not None:
        command += ["--budget", str(budget)]
    if args.threads:
        command += ["--threads", str(args.threads)]
    # MKL otherwise picks its code path by a buffer's alignment, and two correct runs differ in the last bit.
    subprocess.run(command, check=True, env={**os.environ, "MKL_CBWR": "AUTO"})
    figures = json.loads((folder / f"{name}.json").read_text())
    figures["latents"] = torch.load(folder / f"{name}.pt", weights_only=True)
    return figures


def run_engine(args: argparse.Namespace) -> int:
    """Run the engine with and without a budget, compare, report; return the exit status."""
    checkpoint = ensure_checkpoint(args.checkpoint, args.gb)
    with tempfile.TemporaryDirectory(prefix="spillway-demo-") as folder:
        offloaded = run_child("offloaded", Path(folder), args, checkpoint, args.budget)
        full = run_child("loaded", Path(folder), args, checkpoint, None)
    difference = float((offloaded["latents"] - full["latents"]).abs().max())
    result = report.combine(offloaded, full, difference)

    print(f"\n{checkpoint.name}: {offloaded['weights_bytes'] / 1e9:.2f} GB of weights on {offloaded['device']}")
    print(f"{args.steps} steps at {args.size} x {args.size}, {args.budget:.0%} of the weights' bytes as budget\n")
    print(report.table(offloaded, full, difference))
    if offloaded["decisions"]:
        print("\nledger:")
        print("\n".join(f"  {line}" for line in offloaded["decisions"][-DECISIONS_SHOWN:]))

    size = f"{offloaded['weights_bytes'] / 1e9:.2f} GB in {args.budget:.0%} of its size"
    title = f"Flux, {size}: what was resident after each step"
    panel = report.figures_for_picture(offloaded, full, difference)
    picture.draw(args.picture, offloaded["residency"], title, panel)
    print(f"\npicture: {args.picture}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"figures: {args.json}")
    problems = report.failures(result)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, xpu, mps or cpu (default: the best there is)")
    parser.add_argument("--budget", type=float, default=0.25, help="share of the weights' bytes (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help="pixels per side (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gb", type=float, default=DEFAULT_GB, help="size of the model made (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="use this Flux.1 file, or write the model there")
    parser.add_argument("--threads", type=int, help="CPU threads for torch (default: torch's own choice)")
    parser.add_argument("--picture", type=Path, default=CACHE / "residency.png")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="run a graph in this ComfyUI instead")
    parser.add_argument("--comfyui-python", metavar="PY", help="its Python (default: that of a venv in or beside it)")
    parser.add_argument("--image", type=Path, default=graph.DEFAULT_IMAGE, help="with --comfyui: where to put it")
    parser.add_argument("--comfyui-loader", action="store_true", help="with --comfyui: load by its own node instead")
    args = parser.parse_args(argv)
    if not 0 < args.budget <= 1:
        parser.error("--budget is a share of the weights' bytes: above 0, at most 1")
    if args.size <= 0 or args.size % TOKEN_PIXELS:
        parser.error(f"--size must be a positive multiple of {TOKEN_PIXELS} pixels")
    if not MIN_GB <= args.gb <= MAX_GB:
        parser.error(f"--gb must be between {MIN_GB:g} and {MAX_GB:g}")
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def main() -> int:
    args = parse()
    if args.comfyui:
        return graph.run(args, ensure_checkpoint(args.checkpoint, args.gb))
    args.device = args.device or best_device()
    try:
        return run_engine(args)
    except subprocess.CalledProcessError as error:
        print(f"the measured run ended with status {error.returncode}; its message is above", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
