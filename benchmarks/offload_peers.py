"""Weights that do not fit: Spillway beside accelerate, diffusers, RamTorch, mmgp and the plain module.

    python dev.py bench offload_peers                       # all contestants, the demo's 1.1 GB Flux in bf16
    python dev.py bench offload_peers --gb 4 --rounds 8 --json result.json
    python dev.py bench offload_peers --only Spillway       # and the plain module, which is always there
    python dev.py bench offload_peers --cold                # starts read the file from the disk, not from the cache
    python dev.py bench offload_peers --device cuda:0       # on a card, with the file in RAM

Starts are measured alone, each in a fresh process; steps in turns, with all contestants alive.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from demo.checkpoint import DEFAULT_GB, ensure_checkpoint
from demo.flux import config_from_keys
from demo.sampling import make_inputs
from harness import report
from harness.device import CPU, add_device, settle, start_device, used_bytes
from harness.laps import Laps, contest
from harness.peers import CONTESTANTS, ON_CARD, Job
from harness.race import (
    Contestant,
    command_of,
    difference,
    drop_from_cache,
    progress,
    race,
    read_into_cache,
    slug,
    solo,
)
from harness.turns import rotated

REFERENCE = next(iter(CONTESTANTS))
START, SETTLE = 2, 3  # laps: load and first step; a third that settles what the first step learned

# -- in the contestant's process


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load, then compute steps until the parent wants no more; leave the latest output in a file."""
    device = start_device(args.device)
    job = job_of(args, device)
    kind, options = contestants(args)[args.contestant]
    contestant = kind(job, **options)
    if args.prepare:
        with laps.lap("prepare"):
            contestant.prepare()
        return
    noise, ids, cond = make_inputs(job.config, args.size)
    img, txt, pooled = (tensor.to(device, torch.bfloat16) for tensor in (noise, cond.txt, cond.pooled))
    ids, txt_ids = ids.to(device), cond.txt_ids.to(device)
    guidance = None if cond.guidance is None else cond.guidance.to(device)
    time = torch.full((1,), 0.5, device=device)
    with torch.no_grad():
        with laps.lap("load"):
            model = contestant.load()
        label = "first"
        while True:
            laps.begin(label)
            out = model(img, ids, txt, txt_ids, time, pooled, guidance)
            settle(device)
            laps.stop()
            torch.save(out.cpu(), job.scratch / f"{label}.pt")
            facts = contestant.facts() if hasattr(contestant, "facts") else None
            laps.tell(facts=facts, device_bytes=used_bytes(device))
            label = "step"


def contestants(args: argparse.Namespace) -> Mapping[str, tuple[type, dict[str, Any]]]:
    return CONTESTANTS if args.device == CPU else ON_CARD


def job_of(args: argparse.Namespace, device: torch.device) -> Job:
    with safe_open(args.checkpoint, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
    specs = {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}
    scratch = scratch_of(args.contestant, args.out)
    scratch.mkdir(exist_ok=True)
    weights = sum(spec.nbytes for spec in specs.values())
    return Job(args.checkpoint, config_from_keys(specs), weights, scratch, args.out, device)


def scratch_of(name: str, out: Path) -> Path:
    return out / slug(name)


# -- in the parent


def measure(args: argparse.Namespace, names: Sequence[str], out: Path) -> dict[str, dict[str, Any]]:
    """Return all figures by contestant."""

    def command(name: str, *more: str) -> list[str]:
        return command_of(sys.executable, name, "--out", out, "--checkpoint", args.checkpoint, *more)

    for name in names:
        kind, options = contestants(args)[name]
        if hasattr(kind, "prepare") and options["disk"] == "kept":
            solo(name, command(name, "--prepare"), 1, args.threads)
    starts: dict[str, list[Contestant]] = {name: [] for name in names}
    for start in range(args.starts):
        for name in rotated(names, start):
            if any(one.failed for one in starts[name]):
                continue
            progress(f"start {start + 1} of {args.starts}: {name}")
            # Whoever comes first must not pay for the reading of all.
            read_into_cache(args.checkpoint)
            if args.cold:
                drop_from_cache(args.checkpoint)
            starts[name].append(solo(name, command(name), START, args.threads))
            if name != REFERENCE:
                shutil.rmtree(scratch_of(name, out), ignore_errors=True)
    read_into_cache(args.checkpoint)
    running = [name for name in names if not starts[name][-1].failed]
    runs = race({name: command(name) for name in running}, args.rounds, args.threads, settle=SETTLE)
    return {name: figures(name, starts, runs, out) for name in names}


def figures(
    name: str, all_starts: Mapping[str, Sequence[Contestant]], runs: Mapping[str, Contestant], out: Path
) -> dict[str, Any]:
    """Return one contestant's figures, or `failed` with the reason for one that cannot run here."""
    starts, run = all_starts[name], runs.get(name)
    failed = next((one.failed for one in (*starts, run) if one is not None and one.failed), None)
    if failed is not None or run is None:
        return {"failed": failed}
    plain = runs[REFERENCE]
    steps = run.seconds("step")[1:]
    cpu = run.seconds("step", "cpu_seconds")[1:]
    ready, plain_ready = (
        [sum(one.seconds("load") + one.seconds("first")) for one in all_starts[n]] for n in (name, REFERENCE)
    )
    last = run.last()
    pairs = [(scratch_of(name, out) / file, scratch_of(REFERENCE, out) / file) for file in ("first.pt", "step.pt")]
    differences = [difference(ours, theirs) for ours, theirs in pairs]
    return {
        "load_s": [one.seconds("load")[0] for one in starts],
        "ready_s": ready,
        "ready_median_s": statistics.median(ready),
        "ready_ratio": report.ratio(ready, plain_ready),
        "steps_s": steps,
        "step_median_s": statistics.median(steps),
        "step_min_s": min(steps),
        "step_ratio": report.ratio(steps, plain.seconds("step")[1:]),
        "steps_cpu_s": cpu,
        "step_cpu_median_s": statistics.median(cpu),
        "step_cpu_ratio": report.ratio(cpu, plain.seconds("step", "cpu_seconds")[1:]),
        "start_peak_growth_bytes": max(one.last()["peak_rss"] - one.last()["begun_rss"] for one in starts),
        "peak_rss_bytes": last["peak_rss"],
        "peak_growth_bytes": last["peak_rss"] - last["begun_rss"],
        "peak_anonymous_growth_bytes": last["peak_anonymous"] and last["peak_anonymous"] - last["begun_anonymous"],
        # Alone on the device: in the race the others hold memory too.
        "peak_device_bytes": max((one.last().get("device_bytes") or 0 for one in starts), default=0) or None,
        "max_abs_difference": max(value for value in differences if value is not None),
        "facts": last.get("facts"),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Show the figures side by side. Ratios are to the plain module of the same run."""
    plain = results[REFERENCE]
    rows = []
    for name, row in results.items():
        if "failed" in row:
            continue
        ready = row["ready_median_s"]
        rows.append(
            (
                name,
                report.number(ready),
                report.number(row["ready_ratio"]),
                report.number(row["step_median_s"]),
                report.number(row["step_min_s"]),
                report.number(row["step_ratio"], "{:.3f}"),
                report.number(row["step_cpu_median_s"]),
                report.number(row["step_cpu_ratio"], "{:.3f}"),
                report.megabytes(row["peak_growth_bytes"]),
                report.number(row["peak_growth_bytes"] / plain["peak_growth_bytes"]),
                report.megabytes(row["peak_anonymous_growth_bytes"]),
                f"{row['max_abs_difference']:g}",
            )
        )
    times = ("load + first, s", "ratio", "step, s", "least", "ratio", "CPU, s", "ratio")
    heads = ("", *times, "peak RSS growth, MB", "ratio", "anonymous", "max diff")
    lines = [report.table(heads, rows)]
    lines += [f"{name} did not run: {row['failed']}" for name, row in results.items() if "failed" in row]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = report.parser(__doc__)
    report.add_threads(parser)
    add_device(parser)
    parser.add_argument("--gb", type=float, default=DEFAULT_GB, help="size of the file (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="use this Flux.1 file in bf16, or make it there")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default %(default)s)")
    parser.add_argument("--starts", type=int, default=3, help="fresh processes for the time to the first step")
    parser.add_argument("--rounds", type=int, default=7, help="later steps of each contestant, in turns")
    parser.add_argument("--only", action="append", help="only contestants whose name begins so; may be repeated")
    parser.add_argument("--cold", action="store_true", help="empty the file's page cache before each start (Linux)")
    parser.add_argument("--scratch", type=Path, help="folder for what peers write (default: the system's; a few GB)")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.starts, args.rounds) < 1:
        parser.error("--starts and --rounds must be at least 1")
    if args.cold and not hasattr(os, "posix_fadvise"):
        parser.error("--cold needs posix_fadvise, which this system lacks: leave it out")
    return args


def main() -> int:
    args = parse()
    if args.contestant:
        return contest(lambda laps: run_contestant(args, laps))
    args.checkpoint = ensure_checkpoint(args.checkpoint, args.gb)
    wanted = tuple(args.only or ("",))
    names = [name for name in contestants(args) if name == REFERENCE or name.startswith(wanted)]
    with tempfile.TemporaryDirectory(prefix="spillway-peers-", dir=args.scratch) as out:
        results = measure(args, names, Path(out))
    nbytes = args.checkpoint.stat().st_size
    words = f"{args.size} x {args.size}, {args.threads} threads, {args.starts} starts, {args.rounds} rounds"
    where = f"on {args.device}, file {'on disk' if args.cold else 'in the page cache'}"
    about = f"Flux, {nbytes / 1e9:.2f} GB in bf16, {where}, {words}"
    sizes = {"file_bytes": nbytes, "size": args.size, "cold": args.cold, "device": args.device}
    return report.publish(args.json, about, table(results), **sizes, results=results)


if __name__ == "__main__":
    sys.exit(main())
