"""What LoRAs cost a step, at several shares of resident weights, beside ComfyUI's own patcher; on the CPU.

    python dev.py bench lora_cost                     # a Flux of 0.2 GB in bf16; needs about 10 GB of free RAM
    python dev.py bench lora_cost --hidden 256        # a small one, to see that it runs
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench lora_cost --json result.json

Runs in ComfyUI's own Python, found as for its tests. Every contestant is a process of its own with a model of its
own, and all of them take turns: each ratio is of two steps of the same round. Pins may hold all weights, as on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness import comfyui, report
from harness.laps import Laps
from harness.race import Contestant, difference, must_have_run, race, read_into_cache, slug

RANK = 16
COMFYUI = "ComfyUI"
SHARES = {"Spillway 100 %": 1.0, "Spillway 50 %": 0.5, "Spillway 25 %": 0.25}
FILE = "flux.safetensors"
SETTLE = 3  # load with the LoRAs, first step, and a second that uses what the first one learned

# -- in ComfyUI's Python


def write_files(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    from kit.comfyui import checkpoints

    with laps.lap("write"):
        model = checkpoints.flux(str(args.base / FILE), hidden=args.hidden)
        for index in range(max(args.loras)):
            checkpoints.lora(str(args.base / f"lora{index}.safetensors"), model, rank=RANK, seed=index)


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load, put LoRAs on, and run ComfyUI's sampler once, a turn for each step."""
    comfyui.start_comfyui(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils

    comfyui.load_installed_pack()
    from spillway.patcher.comfyui.loading.load import load_diffusion_model
    from spillway.patcher.policy import Policy

    name, _, count = args.contestant.rpartition(" + ")
    torch.set_num_threads(args.threads)
    path = str(args.base / FILE)
    with torch.inference_mode():
        with laps.lap("load"):
            model: Any = comfy.sd.load_diffusion_model(path) if name == COMFYUI else load_diffusion_model(path)
            for index in range(int(count)):
                lora = comfy.utils.load_torch_file(str(args.base / f"lora{index}.safetensors"))
                model, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0)
            if name != COMFYUI:
                total = model.dynamic.total_bytes
                model.set_policy(Policy(vram_bytes=int(total * SHARES[name]), pinned_bytes=2 * total))

        def counters() -> dict[str, Any]:
            return {"counters": None if name == COMFYUI else model.dynamic.ledger.as_dict()["counters"]}

        latents = comfyui.sample_in_turns(laps, model, args, counters)
        torch.save(latents, latents_of(args.contestant, args.base))


def latents_of(contestant: str, folder: Path) -> Path:
    return folder / f"{slug(contestant)}.pt"


# -- in the parent


def moved(run: Contestant) -> list[int]:
    """Count the bytes brought in each step after the first: to stay, or for one use."""
    totals = [
        lap["counters"]["bytes_loaded"] + lap["counters"]["bytes_streamed"] for lap in run.laps if lap.get("counters")
    ]
    return [after - before for before, after in itertools.pairwise(totals)]


def summary(runs: Mapping[str, Contestant], folder: Path) -> dict[str, dict[str, Any]]:
    """Return each contestant's medians, the step's ratio to no LoRA and to ComfyUI with as many, and bytes a step."""
    found = {}
    for who, run in runs.items():
        name, _, count = who.rpartition(" + ")
        steps, cpu = run.seconds("step")[1:], run.seconds("step", "cpu_seconds")[1:]
        bare, comfyuis = runs[f"{name} + 0"], runs[f"{COMFYUI} + {count}"]
        row = {
            "first_step_s": run.seconds("first")[0],
            "second_step_s": run.seconds("step")[0],
            "steps_s": report.median(steps),
            "steps_cpu_s": report.median(cpu),
            "steps_s_to_no_lora": report.ratio(steps, bare.seconds("step")[1:]),
            "steps_cpu_s_to_no_lora": report.ratio(cpu, bare.seconds("step", "cpu_seconds")[1:]),
            "first_step_s_to_comfyui": run.seconds("first")[0] / comfyuis.seconds("first")[0],
            "steps_s_to_comfyui": report.ratio(steps, comfyuis.seconds("step")[1:]),
            "max_abs_difference": difference(latents_of(who, folder), latents_of(comfyuis.name, folder)),
        }
        if name != COMFYUI:
            row["bytes_second_step"], *rest = moved(run)
            row["bytes_later_steps"] = sorted(set(rest))
        found[who] = row
    return found


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    def bytes_of(row: Mapping[str, Any]) -> str:
        later = row.get("bytes_later_steps")
        return "-" if later is None else " to ".join(dict.fromkeys(report.megabytes(b) for b in (later[0], later[-1])))

    columns: dict[str, Any] = {
        "first step, s": lambda row: report.number(row["first_step_s"]),
        "/ ComfyUI": lambda row: report.number(row["first_step_s_to_comfyui"]),
        "later step, s": lambda row: report.number(row["steps_s"]),
        "/ ComfyUI ": lambda row: report.number(row["steps_s_to_comfyui"]),
        "/ no LoRA": lambda row: report.number(row["steps_s_to_no_lora"], "{:.3f}"),
        "CPU / no LoRA": lambda row: report.number(row["steps_cpu_s_to_no_lora"], "{:.3f}"),
        "MB brought a later step": bytes_of,
        "max diff to ComfyUI": lambda row: f"{row['max_abs_difference']:g}",
    }
    lines = [
        (f"{who} LoRA{'' if who.endswith(' 1') else 's'}", *[show(row) for show in columns.values()])
        for who, row in rows.items()
    ]
    return report.table(("", *columns), lines)


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    nbytes = (args.base / FILE).stat().st_size
    read_into_cache(args.base / FILE)
    names = [f"{name} + {count}" for name in (COMFYUI, *SHARES) for count in args.loras]
    runs = race({name: command(name) for name in names}, args.rounds, args.threads, settle=SETTLE)
    must_have_run(*runs.values())
    rows = summary(runs, args.base)
    words = f"{args.size} x {args.size}, {args.threads} threads, in ComfyUI, which computes in fp32 here"
    about = f"Flux, {nbytes / 1e9:.2f} GB in bf16, LoRAs of rank {RANK} on every matrix; {words}"
    return comfyui.Outcome(
        (about, table(rows)), {"file_bytes": nbytes, "size": args.size, "rank": RANK, "results": rows}
    )


def main() -> int:
    parser = comfyui.parser(__doc__)
    comfyui.add_flux(parser, 1024, "1024 is 0.2 GB (default)", size=512)
    parser.add_argument("--loras", type=int, nargs="+", default=[0, 1, 4], help="how many, for each row; 0 comes first")
    parser.add_argument("--rounds", type=int, default=9, help="later steps of each contestant, in turns")
    args = parser.parse_args()
    args.steps = SETTLE - 1 + args.rounds  # of one run of the sampler
    return comfyui.run(args, run_contestant, measure, write=write_files)


if __name__ == "__main__":
    sys.exit(main())
