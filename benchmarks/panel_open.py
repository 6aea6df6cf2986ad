"""Sampling while a page looks at the memory panel, beside the same page with the panel closed.

    python dev.py bench panel_open --threads 1                # needs ComfyUI, Chromium and 3 GB of RAM
    python dev.py bench panel_open --viewer socket            # without Chromium

A page of ComfyUI is open in Chromium all the time, on the same machine. Prompts sample in turns with the tab *Memory*
open and closed; each comes first in every other round, so that a drift is nobody's. Two ratios are told, as medians of
the pairs: of the prompts' seconds, which have what Chromium computes in them where cores are few, and of the seconds of
processor time that the server's process took. A socket in the page's place asks the same of the server and draws
nothing: what is left is what sampling pays where the page is drawn elsewhere, by a graphics card or another machine.
Third, the processor time of all the server's threads but the busiest, which with one thread is the one that samples: so
much the server does for the page, as a share of the prompt's seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import Any

from harness import comfyui, report
from harness.laps import Laps
from harness.panel_viewers import VIEWERS
from harness.race import must_have_run, solo
from harness.served_flux import duration, must_succeed, prompt, write_models

CLOSED, OPEN = "closed", "open"


# -- in ComfyUI's Python


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui)  # for the modules that the files are written from
    laps.begin(args.contestant)
    figures = looked_at(args)
    laps.stop()
    laps.tell(**figures)


def looked_at(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of prompts, and of the server's process, with the tab open and closed, in turns."""
    import psutil

    from kit.comfyui.running_server import Server

    write_models(args.base, args.hidden)
    settings = args.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"Comfy.TutorialCompleted": true}')

    seconds: dict[str, list[float]] = {CLOSED: [], OPEN: []}
    processor: dict[str, list[float]] = {CLOSED: [], OPEN: []}
    beside: dict[str, list[float]] = {CLOSED: [], OPEN: []}
    reports = {CLOSED: 0, OPEN: 0}
    with Server(args.base) as server:
        viewer = VIEWERS[args.viewer](args.base, server.port)
        try:
            process = psutil.Process(server.process.pid)
            must_succeed(server.run(prompt(args.steps, 0)))
            for number in range(2 * args.rounds):
                wanted = OPEN if number % 4 in (1, 2) else CLOSED
                viewer.show(wanted is OPEN)
                sent, before = viewer.reports(), thread_seconds(process)
                run = server.run(prompt(args.steps, 1 + number))
                must_succeed(run)
                after = thread_seconds(process)
                taken = sorted(after[number] - before.get(number, 0.0) for number in after)
                seconds[wanted].append(duration(run))
                processor[wanted].append(sum(taken))
                beside[wanted].append(sum(taken[:-1]) / seconds[wanted][-1])
                reports[wanted] += viewer.reports() - sent
                print(
                    f"{wanted}: {seconds[wanted][-1]:.2f} s, {processor[wanted][-1]:.2f} s of processor",
                    file=sys.stderr,
                )
        finally:
            viewer.close()
    ratios = {name: pairs(found) for name, found in (("prompt", seconds), ("processor", processor))}
    return {
        "prompt_s": seconds,
        "processor_s": processor,
        "beside": beside,
        "reports": reports,
        "pairs": ratios,
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
    }


def thread_seconds(process: Any) -> dict[int, float]:
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


def pairs(found: dict[str, list[float]]) -> list[float]:
    return [opened / closed for closed, opened in zip(found[CLOSED], found[OPEN], strict=True)]


# -- in the parent


def measure(args: argparse.Namespace, command: Any) -> comfyui.Outcome:
    if args.viewer == "chromium":
        add_browser()
    run = solo("panel", command("panel"), 1, args.threads)
    must_have_run(run)
    found = run.last()
    rows = []
    for name in (CLOSED, OPEN):
        medians = (f"{statistics.median(found[key][name]):.3f}" for key in ("prompt_s", "processor_s"))
        share = f"{100 * statistics.median(found['beside'][name]):.2f} %"
        rows.append((name, *medians, share, str(found["reports"][name])))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    ratio = found["ratio"]
    lines = (
        report.table(("tab", "a prompt, s", "the server's processor, s", "all threads but one", "reports sent"), rows),
        f"open to closed: {ratio['prompt']:.3f} of the prompt, {ratio['processor']:.3f} of the server's processor time",
        f"load of the machine at the end (1, 5 and 15 minutes): {load}",
    )
    return comfyui.Outcome(lines, {"panel": found, "load": load})


def add_browser() -> None:
    """Put playwright on the path of the measuring process, and say where Chromium is."""
    comfyui.comfyui_finder()  # puts the tests' folder on the path
    from kit import environment

    chromium = environment.find_chromium()
    if chromium is None:
        sys.exit("no Chromium found: install it, or set SPILLWAY_CHROMIUM to its path")
    added: dict[str, str] = {}
    environment.add_playwright(comfyui.find_comfyui()[1], added)
    os.environ.update({**added, "SPILLWAY_CHROMIUM": chromium})


def main() -> int:
    parser = comfyui.parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=12, help="prompts with the tab open and closed (default %(default)s)"
    )
    parser.add_argument("--viewer", choices=list(VIEWERS), default="chromium", help="what looks (default %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="of a prompt (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model (default %(default)s)")
    return comfyui.run(parser.parse_args(), run_contestant, measure)


if __name__ == "__main__":
    sys.exit(main())
