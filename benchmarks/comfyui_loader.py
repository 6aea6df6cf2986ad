"""ComfyUI's loader and Spillway's: load time, memory, first step, later steps.

    python dev.py bench comfyui_loader                         # a 2 GB Flux in bf16; needs about 14 GB of free RAM
    python dev.py bench comfyui_loader --hidden 1024           # a small one
    python dev.py bench comfyui_loader --device cuda:0         # on a card, with ComfyUI's dynamic VRAM off
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench comfyui_loader --json result.json

Runs in ComfyUI's own Python, found as for its tests. Each contestant is a process of its own; one of ours at a
time races ComfyUI's loader in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness import comfyui, report
from harness.device import CPU, add_device
from harness.laps import Laps
from harness.race import Contestant, difference, must_have_run, race, read_into_cache, slug
from harness.turns import rotated

REFERENCE = "ComfyUI"
# Ours: the share of the weights' bytes, in the dtype that ComfyUI computes in, that may be resident.
SHARES: dict[str, float | None] = {"Spillway, no budget": None, "Spillway 50 %": 0.5, "Spillway 25 %": 0.25}
FILE = "flux.safetensors"
SETTLE = 3  # load, first step, and a second that settles what the first one learned
CONTEXT, POOLED = 4096, 768


def model_path(base: Path) -> Path:
    return base / "models" / "diffusion_models" / FILE


# -- in ComfyUI's Python


def write_model(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    from kit.comfyui import checkpoints

    with laps.lap("write"):
        path = model_path(args.base)
        path.parent.mkdir(parents=True)
        checkpoints.flux(str(path), hidden=args.hidden, context=CONTEXT, pooled=POOLED)


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load by the node and run ComfyUI's sampler once, a turn for each step."""
    comfyui.start_comfyui(args.comfyui, args.base, args.device)
    import nodes

    if args.contestant != REFERENCE:
        comfyui.load_installed_pack()
        from spillway.nodes.load import SpillwayLoadDiffusionModel
        from spillway.nodes.policy import SpillwayPolicy  # noqa: F401 - imported before the clock runs

    torch.set_num_threads(args.threads)

    def ours() -> Any:
        (model,) = SpillwayLoadDiffusionModel.execute(FILE, "default").result
        share = SHARES[args.contestant]
        return model if share is None else with_budget(model, share)

    with torch.inference_mode():
        with laps.lap("load"):
            model = nodes.UNETLoader().load_unet(FILE, "default")[0] if args.contestant == REFERENCE else ours()

        latents = comfyui.sample_in_turns(laps, model, args, lambda: {"facts": facts_of(model)})
        torch.save(latents, args.base / f"{slug(args.contestant)}.pt")


def with_budget(model: Any, share: float) -> Any:
    """Do what the policy node does, with a share in place of gigabytes."""
    from spillway.patcher.policy import Policy

    model = model.clone()
    model.set_policy(Policy(vram_bytes=int(model.dynamic.total_bytes * share)))
    return model


def facts_of(model: Any) -> dict[str, Any] | None:
    if not hasattr(model, "dynamic"):
        return None
    dynamic = model.dynamic
    return {"total": dynamic.total_bytes, "peak_resident": dynamic.peak_resident_bytes, **dynamic.ledger.as_dict()}


# -- in the parent


def races_of(args: argparse.Namespace, command: Callable[[str], list[str]]) -> dict[str, list[dict[str, Any]]]:
    """Race each contestant of ours against ComfyUI's loader; return the figures of each race."""
    races: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARES}
    for start in range(args.starts):
        for name in SHARES:
            names = rotated([REFERENCE, name], start)
            read_into_cache(model_path(args.base))
            runs = race({n: command(n) for n in names}, args.rounds, args.threads, settle=SETTLE)
            must_have_run(*runs.values())
            diff = difference(args.base / f"{slug(name)}.pt", args.base / f"{slug(REFERENCE)}.pt")
            both = {"ours": figures(runs[name]), "comfyui": figures(runs[REFERENCE])}
            races[name].append({**both, "difference": diff})
            print(f"{name}, {start + 1} of {args.starts} done", file=sys.stderr)
    return races


def figures(run: Contestant) -> dict[str, Any]:
    load, last = run.laps[0], run.last()
    return {
        "load_s": load["seconds"],
        "load_rss_growth_bytes": load["rss"] - load["begun_rss"],
        "first_step_s": run.seconds("first")[0],
        "ready_s": load["seconds"] + run.seconds("first")[0],
        "steps_s": run.seconds("step")[1:],
        "steps_cpu_s": run.seconds("step", "cpu_seconds")[1:],
        "ready_cpu_s": load["cpu_seconds"] + run.seconds("first", "cpu_seconds")[0],
        "peak_growth_bytes": last["peak_rss"] - last["begun_rss"],
        "peak_rss_bytes": last["peak_rss"],
        "peak_anonymous_growth_bytes": last["peak_anonymous"] and last["peak_anonymous"] - last["begun_anonymous"],
        "peak_device_bytes": max((lap.get("device_bytes") or 0 for lap in run.laps), default=0) or None,
        "facts": last.get("facts"),
    }


KEYS = (
    *("load_s", "load_rss_growth_bytes", "first_step_s", "ready_s", "ready_cpu_s"),
    *("peak_growth_bytes", "peak_anonymous_growth_bytes"),
)


def summary(races: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return a row for each contestant. Ratios pair what was measured in the same race, steps in the same round."""
    found = {REFERENCE: row([one["comfyui"] for entries in races.values() for one in entries])}
    for name, entries in races.items():
        ours, comfyuis = [one["ours"] for one in entries], [one["comfyui"] for one in entries]
        found[name] = row(ours)
        for key in KEYS:
            found[name][f"{key}_ratio"] = report.ratio([o[key] for o in ours], [c[key] for c in comfyuis])
        for key in ("steps_s", "steps_cpu_s"):
            pairs = [pair for o, c in zip(ours, comfyuis, strict=True) for pair in zip(o[key], c[key], strict=True)]
            found[name][f"{key}_ratio"] = report.ratio([o for o, _ in pairs], [c for _, c in pairs])
        found[name]["max_abs_difference"] = max(one["difference"] for one in entries)
    return found


def row(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps, cpu = ([step for entry in entries for step in entry[key]] for key in ("steps_s", "steps_cpu_s"))
    return {
        **{key: statistics.median(entry[key] for entry in entries) for key in KEYS},
        "steps_s": statistics.median(steps),
        "step_min_s": min(steps),
        "steps_cpu_s": statistics.median(cpu),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Show medians, and in brackets the ratio to ComfyUI in the same race."""
    columns = (
        ("load, s", "load_s", report.number),
        ("RSS growth at load, MB", "load_rss_growth_bytes", report.megabytes),
        ("first step, s", "first_step_s", report.number),
        ("load + first, s", "ready_s", report.number),
        ("step, s", "steps_s", report.number),
        ("CPU, s", "steps_cpu_s", report.number),
        ("peak RSS growth, MB", "peak_growth_bytes", report.megabytes),
        ("anonymous", "peak_anonymous_growth_bytes", report.megabytes),
    )
    lines = []
    for name, figures_ in rows.items():
        cells = []
        for _, key, show in columns:
            ratio = figures_.get(f"{key}_ratio")
            cells.append(show(figures_[key]) + ("" if ratio is None else f" ({ratio:.2f})"))
        lines.append((name, *cells, f"{figures_.get('max_abs_difference', 0):g}"))
    return report.table(("", *[head for head, _, _ in columns], "max diff"), lines)


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    races = races_of(args, command)
    rows = summary(races)
    nbytes = model_path(args.base).stat().st_size
    where = "in ComfyUI, which computes in fp32 here" if args.device == CPU else f"in ComfyUI on {args.device}"
    words = f"{args.size} x {args.size}, {args.threads} threads, {where}"
    about = f"Flux, {nbytes / 1e9:.2f} GB in bf16, {words}"
    sizes = {"file_bytes": nbytes, "size": args.size, "device": args.device}
    return comfyui.Outcome((about, table(rows)), {**sizes, "results": rows, "races": races})


def main() -> int:
    parser = comfyui.parser(__doc__)
    add_device(parser)
    comfyui.add_flux(parser, 3072, "3072 is 2.05 GB (default)", size=256)
    parser.add_argument("--starts", type=int, default=3, help="races of each of ours against ComfyUI")
    parser.add_argument("--rounds", type=int, default=5, help="later steps of each race, in turns")
    args = parser.parse_args()
    args.steps = SETTLE - 1 + args.rounds  # of one run of the sampler
    return comfyui.run(args, run_contestant, measure, write=write_model)


if __name__ == "__main__":
    sys.exit(main())
