"""The core's loader and Spillway's in ComfyUI itself, on the CPU: load time, memory, first step, later steps.

    python dev.py bench host_loader                         # a 2 GB Flux in bf16; needs about 14 GB of free RAM
    python dev.py bench host_loader --hidden 1024           # a small one
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench host_loader --json result.json

Runs in ComfyUI's own Python, found as for the host tests. Each contestant is a process of its own; one of ours at a
time races the core's loader in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report as report
import torch
from _host import contestant_parser, find_host, start_core
from _pack import load_pack
from _race import Contestant, Laps, contest, difference, race, read_into_cache, solo

REFERENCE = "core"
# Ours: the share of the weights' bytes, in the dtype that ComfyUI computes in, that may be resident.
SHARES: dict[str, float | None] = {"Spillway, no budget": None, "Spillway 50 %": 0.5, "Spillway 25 %": 0.25}
FILE = "flux.safetensors"
SETTLE = 3  # load, first step, and a second that settles what the first one learned
CONTEXT, POOLED = 4096, 768

# -- in ComfyUI's Python


def write_model(args: argparse.Namespace, laps: Laps) -> None:
    start_core(args.comfyui, args.base)
    import checkpoints

    with laps.lap("write"):
        folder = args.base / "models" / "diffusion_models"
        checkpoints.flux(str(folder / FILE), hidden=args.hidden, context=CONTEXT, pooled=POOLED)


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load by the node, then one run of the core's sampler, which waits for its turn between the steps."""
    start_core(args.comfyui, args.base)
    import nodes
    import sampling

    if args.contestant != REFERENCE:
        load_pack()
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

        def after_step(step: int, *_: Any) -> None:
            laps.stop()
            laps.tell(facts=facts_of(model))
            if step + 1 < args.steps:
                laps.begin("step")

        laps.begin("first")
        latents = sampling.sample(model, steps=args.steps, width=args.size, height=args.size, callback=after_step)
        torch.save(latents, args.base / f"{slug(args.contestant)}.pt")


def with_budget(model: Any, share: float) -> Any:
    """What the policy node does, with a share in place of gigabytes."""
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


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def measure(args: argparse.Namespace, command: Any) -> dict[str, list[dict[str, Any]]]:
    """By contestant of ours: the figures of each race against the core's loader."""
    races: dict[str, list[dict[str, Any]]] = {name: [] for name in SHARES}
    for start in range(args.starts):
        for name in SHARES:
            names = [REFERENCE, name] if start % 2 == 0 else [name, REFERENCE]
            read_into_cache(args.base / "models" / "diffusion_models" / FILE)
            runs = race({n: command(n) for n in names}, args.rounds, args.threads, settle=SETTLE)
            for run in runs.values():
                if run.failed is not None:
                    raise SystemExit(f"{run.name} failed: {run.failed}")
            diff = difference(args.base / f"{slug(name)}.pt", args.base / f"{slug(REFERENCE)}.pt")
            races[name].append({"ours": figures(runs[name]), "core": figures(runs[REFERENCE]), "difference": diff})
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
        "facts": last.get("facts"),
    }


KEYS = (
    *("load_s", "load_rss_growth_bytes", "first_step_s", "ready_s", "ready_cpu_s"),
    *("peak_growth_bytes", "peak_anonymous_growth_bytes"),
)


def summary(races: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One row a contestant. Ratios pair what was measured in the same race, and steps in the same round of it."""
    found = {REFERENCE: row([one["core"] for entries in races.values() for one in entries])}
    for name, entries in races.items():
        ours, core = [one["ours"] for one in entries], [one["core"] for one in entries]
        found[name] = row(ours)
        for key in KEYS:
            found[name][f"{key}_ratio"] = report.ratio([o[key] for o in ours], [c[key] for c in core])
        for key in ("steps_s", "steps_cpu_s"):
            pairs = [pair for o, c in zip(ours, core, strict=True) for pair in zip(o[key], c[key], strict=True)]
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
    """Medians; in brackets the ratio to the core of the same race."""
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


def parse() -> argparse.Namespace:
    parser = contestant_parser(__doc__, 3072, "3072 is 2.05 GB (default)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default %(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="races of each of ours against the core")
    parser.add_argument("--rounds", type=int, default=5, help="later steps of each race, in turns")
    return parser.parse_args()


def main() -> int:
    args = parse()
    args.steps = SETTLE - 1 + args.rounds  # of one run of the sampler
    if args.contestant:
        return contest(lambda laps: (write_model if args.contestant == "write" else run_contestant)(args, laps))
    args.comfyui, python = find_host()

    def command(name: str) -> list[str]:
        told = ("--base", args.base, "--comfyui", args.comfyui, "--hidden", args.hidden, "--size", args.size)
        more = ("--rounds", args.rounds, "--threads", args.threads)
        return [str(part) for part in (python, __file__, "--contestant", name, *told, *more)]

    with tempfile.TemporaryDirectory(prefix="spillway-host-") as folder:
        args.base = Path(folder)
        (args.base / "models" / "diffusion_models").mkdir(parents=True)
        written = solo("write", command("write"), 1, args.threads)
        if written.failed is not None:
            sys.exit(f"the model could not be written: {written.failed}")
        nbytes = (args.base / "models" / "diffusion_models" / FILE).stat().st_size
        races = measure(args, command)
    rows = summary(races)
    words = f"{args.size} x {args.size}, {args.threads} threads, in ComfyUI, which computes in fp32 here"
    print(f"\nFlux, {nbytes / 1e9:.2f} GB in bf16, {words}\n")
    print(table(rows))
    if args.json:
        more = {"file_bytes": nbytes, "size": args.size, "host": report.host_versions(args.comfyui, python)}
        report.write(args.json, report.result(**more, results=rows, races=races))
    return 0


if __name__ == "__main__":
    sys.exit(main())
