"""The schedule on a virtual clock: the engine's steps beside what the hardware allows and what peers would take.

    python dev.py bench schedule                          # a quarter of all rows, in about ten minutes
    python dev.py bench schedule --short                  # a hundred, in about a minute
    python dev.py bench schedule --all                    # every row, in about forty minutes
    python dev.py bench schedule --only Flux --gpu 4090
    python dev.py bench schedule --json rows.json --plot worst.png

Runs without a device, as copies, waits and computations move a clock. Not on Windows, which commits the memory that is
only reserved here. Exit status 1: a row misses a bound.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from harness.pack import ROOT, load_pack

load_pack()
sys.path.append(str(ROOT / "tests"))

from harness import report
from virtual.rows import AGAIN, FIRST, LATER, SECOND, SECOND_AGAIN, Case, Runner, cases, misses

LEFT_OUT = (
    "The clock leaves out the depth of kernel queues, the allocator, what computation, readers and bus take of host "
    "memory from one another, what a page fault costs, and whatever else runs on the machine."
)


QUARTER, SHORT = 4, 41  # one row in that many


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw a step of the worst row, beside ComfyUI's, to this PNG")
    parser.add_argument("--only", metavar="MODEL", help="models whose name has this in it")
    parser.add_argument("--gpu", metavar="NAME", help="cards whose name has this in it")
    parser.add_argument("--ram", type=int, help="this RAM alone, in GB")
    parser.add_argument("--dtype", help="this dtype alone")
    parser.add_argument("--share", type=float, help="this share alone")
    parser.add_argument("--short", action="store_true", help="about a hundred rows")
    parser.add_argument("--all", action="store_true", help="every row; without it, any two values of two columns once")
    parser.add_argument(
        "--worst", type=int, default=25, help="how many of the worst rows to list (default %(default)s)"
    )
    args = parser.parse_args()
    logging.getLogger("spillway").setLevel(logging.ERROR)

    runner, rows, begun = Runner(), [], time.monotonic()
    for case in cases(1 if args.all else SHORT if args.short else QUARTER):
        if wanted(args, case) and runner.fits(case):
            rows.append(runner.row(case))
            if rows[-1]["model"] != (rows[-2]["model"] if len(rows) > 1 else None):
                print(f"{time.monotonic() - begun:6.1f} s  {case.model}", flush=True)
    if not rows:
        parser.error("no row is called so")
    print("\n" + summary(rows))
    print("\n" + worst(rows, args.worst))
    missed = [row for row in rows if misses(row)]
    counts = collections.Counter(name for row in missed for name in misses(row))
    took = f"{time.monotonic() - begun:.0f} s, {time.process_time():.0f} s of CPU"
    print(f"\n{len(rows)} rows in {took}; {len(missed)} miss a bound: {dict(counts)}")
    print(f"Bounds: later steps {LATER}, the second {SECOND}, the first {FIRST}, and no slower than any peer.")
    first, second = (sum(row[key] > bound for row in rows) for key, bound in ((AGAIN, FIRST), (SECOND_AGAIN, SECOND)))
    print(
        "Again: the first two steps of another process, which knows in which order layers ran and how long they took; "
        f"{first} first ones above {FIRST}, {second} second ones above {SECOND}."
    )
    print(LEFT_OUT)
    if args.json is not None:
        kept = [{key: value for key, value in row.items() if key not in (AGAIN, SECOND_AGAIN)} for row in rows]
        args.json.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
    if args.plot is not None:
        from virtual import timeline  # which needs matplotlib

        timeline.draw(args.plot, runner, case_of(max(rows, key=lambda row: row["step_over_ideal"])))
    return int(bool(missed))


def wanted(args: argparse.Namespace, case: Case) -> bool:
    """Say whether the arguments ask for that case."""
    named = ((args.only, case.model), (args.gpu, case.gpu))
    equal = ((args.ram, case.ram_gb), (args.dtype, case.dtype), (args.share, case.share))
    return all(part is None or part.lower() in name.lower() for part, name in named) and all(
        asked is None or asked == value for asked, value in equal
    )


def case_of(row: dict[str, Any]) -> Case:
    return Case(*(row[name] for name in ("model", "gpu", "ram_gb", "dtype", "lora", "share")))


def summary(rows: list[dict[str, Any]]) -> str:
    """Show the worst of each model and card."""
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault((row["model"], row["gpu"]), []).append(row)
    columns = ["model", "card", "rows", "miss", "later / ideal", "second / ideal", "first / limit", "best peer / ideal"]
    names = ("step_over_ideal", "second_over_ideal", "first_over_limit")
    lines = []
    for (model, gpu), own in groups.items():
        worst = [f"{max(row[name] for row in own):.2f}" for name in names]
        at = max(own, key=lambda row: row["step_over_ideal"])
        best = f"{min(at['peers'].values()):.2f}"
        lines.append([model, gpu, str(len(own)), str(sum(bool(misses(row)) for row in own)), *worst, best])
    return report.table(columns, lines)


def worst(rows: list[dict[str, Any]], count: int) -> str:
    """List the rows whose later steps are furthest from the ideal."""
    peers = list(rows[0]["peers"])
    columns = ["model", "card", "RAM", "dtype", "share", "step, s", "compute", "bus", "reads"]
    columns += ["later", "second", "again", "first", "again", *peers]
    lines = []
    for row in sorted(rows, key=lambda row: -row["step_over_ideal"])[:count]:
        form = row["dtype"] + (" + LoRA" if row["lora"] else "")
        times = [f"{row[name]:.2f}" for name in ("step_s", "compute_s", "bus_s", "reader_s")]
        names = ("step_over_ideal", "second_over_ideal", SECOND_AGAIN, "first_over_limit", AGAIN)
        ratios = [f"{row[name]:.2f}" for name in names]
        others = [f"{row['peers'][peer]:.2f}" for peer in peers]
        what = [row["model"], row["gpu"], str(row["ram_gb"]), form, f"{row['share']:.2f}"]
        lines.append([*what, *times, *ratios, *others])
    return report.table(columns, lines)


if __name__ == "__main__":
    sys.exit(main())
