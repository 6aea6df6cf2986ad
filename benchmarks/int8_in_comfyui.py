"""A whole model in INT8 in ComfyUI, with and without a LoRA, beside ComfyUI's patcher and ours; on the CPU.

    python dev.py bench int8_in_comfyui                     # a Flux of 1.15 GB in bf16; needs about 17 GB of free RAM
    python dev.py bench int8_in_comfyui --hidden 256        # a small one, to see that it runs
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench int8_in_comfyui --json result.json

Runs in ComfyUI's own Python, found as for its tests; on a CPU ComfyUI computes in fp32. Every contestant is a
process of its own and all of them take turns: each ratio is of two steps of the same round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness import comfyui, report
from harness.laps import Laps
from harness.race import Contestant, must_have_run, race, read_into_cache, slug

COMFYUI, OURS = "ComfyUI", "Spillway"
SETTLE = 3  # load, first step, and a second that uses what the first one learned
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
NAMES = (COMFYUI, OURS, WITH_LORA, *QUANTISED)

# -- in ComfyUI's Python


def write_files(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    from kit.comfyui import checkpoints

    with laps.lap("write"):
        path = checkpoints.flux(str(args.base / FILE), hidden=args.hidden, depth=2, depth_single=4)
        checkpoints.lora(str(args.base / LORA), path, rank=16)


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load, and run ComfyUI's sampler once, a turn for each step."""
    comfyui.start_comfyui(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils

    comfyui.load_installed_pack()
    from spillway.patcher.comfyui.loading.load import load_diffusion_model
    from spillway.patcher.policy import Policy

    name = args.contestant
    torch.set_num_threads(args.threads)
    path = str(args.base / FILE)
    with torch.inference_mode():
        with laps.lap("load"):
            if name == COMFYUI:
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

        def decisions() -> dict[str, Any]:
            return {"words": [] if name == COMFYUI else list(model.dynamic.ledger.decisions)}

        torch.save(comfyui.sample_in_turns(laps, model, args, decisions), args.base / f"{slug(name)}.pt")


# -- in the parent


def summary(runs: Mapping[str, Contestant], folder: Path) -> dict[str, dict[str, Any]]:
    """Return each contestant's load, first step, later steps, ratio to ComfyUI, and how near its latents are."""
    found = {}
    for name, run in runs.items():
        same_lora = WITH_LORA if "LoRA" in name else COMFYUI
        latents, wanted = (torch.load(folder / f"{slug(who)}.pt").double().flatten() for who in (name, same_lora))
        found[name] = {
            "load_s": run.seconds("load")[0],
            "first_step_s": run.seconds("first")[0],
            "steps_s": report.median(run.seconds("step")[1:]),
            "gain_to_comfyui": report.ratio(runs[COMFYUI].seconds("step")[1:], run.seconds("step")[1:]),
            "cosine": float(torch.nn.functional.cosine_similarity(latents, wanted, dim=0)),
            "words": next((lap["words"] for lap in reversed(run.laps) if lap.get("words")), []),
        }
    return found


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("", "load, s", "first step, s", "later step, s", "ComfyUI's time / its own", "cosine")
    keys = ("load_s", "first_step_s", "steps_s", "gain_to_comfyui")
    lines = [(name, *[report.number(row[key]) for key in keys], f"{row['cosine']:.6f}") for name, row in rows.items()]
    return report.table(columns, lines)


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    nbytes = (args.base / FILE).stat().st_size
    read_into_cache(args.base / FILE)
    runs = race({name: command(name) for name in NAMES}, args.rounds, args.threads, settle=SETTLE)
    must_have_run(*runs.values())
    rows = summary(runs, args.base)
    words = f"{args.size} x {args.size}, {args.threads} threads, in ComfyUI, which computes in fp32"
    about = f"Flux, {nbytes / 1e9:.2f} GB in bf16; {words}"
    return comfyui.Outcome((about, table(rows)), {"file_bytes": nbytes, "size": args.size, "results": rows})


def main() -> int:
    parser = comfyui.parser(__doc__)
    comfyui.add_flux(parser, 2048, "2048 is 1.15 GB (default)", size=512)
    parser.add_argument("--rounds", type=int, default=5, help="later steps of each contestant, in turns")
    args = parser.parse_args()
    args.steps = SETTLE - 1 + args.rounds  # of one run of the sampler
    return comfyui.run(args, run_contestant, measure, write=write_files)


if __name__ == "__main__":
    sys.exit(main())
