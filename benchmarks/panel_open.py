"""Sampling while a page looks at the memory panel, beside the same page with the panel closed.

    python dev.py bench panel_open --threads 1                # needs ComfyUI, Chromium and 3 GB of RAM
    python dev.py bench panel_open --threads 1 --rounds 25

A page of ComfyUI is open in Chromium all the time, on the same machine. Prompts sample in turns with the tab *Memory*
open and closed; each comes first in every other round, so that a drift is nobody's. Two ratios are told, as medians of
the pairs: of the prompts' seconds, which have what Chromium computes in them where cores are few, and of the seconds of
processor time that the server's process took. Third, the processor time of all the server's threads but the busiest,
which with one thread is the one that samples: so much the server does for the page, as a share of the prompt's seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import Any

from harness import comfyui, report
from harness.laps import Laps
from harness.race import must_have_run, solo

CLOSED, OPEN = "closed", "open"
TAB = "Workspace.ToggleSidebarTab.spillway-memory"
READY = "window.app?.extensionManager?.sidebarTab?.sidebarTabs.some((tab) => tab.id === 'spillway-memory')"
COUNT = """() => {
  window.reports = 0;
  window.comfyAPI.api.api.addEventListener("spillway.state", () => (window.reports += 1));
}"""
SETTLE_MS = 1500


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
    from playwright.sync_api import sync_playwright

    from kit.comfyui.checkpoints.diffusion_models import flux
    from kit.comfyui.checkpoints.text_encoders import clip_l
    from kit.comfyui.panel_page import ARGUMENTS
    from kit.comfyui.running_server import Server

    folder = args.base / "models"
    for name in ("diffusion_models", "text_encoders"):
        (folder / name).mkdir(parents=True)
    sizes = {"hidden": args.hidden, "context": 768, "pooled": 768, "depth": 2, "depth_single": 4}
    flux(folder / "diffusion_models" / "flux.safetensors", **sizes)
    clip_l(folder / "text_encoders" / "clip.safetensors")
    settings = args.base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"Comfy.TutorialCompleted": true}')

    seconds: dict[str, list[float]] = {CLOSED: [], OPEN: []}
    processor: dict[str, list[float]] = {CLOSED: [], OPEN: []}
    beside: dict[str, list[float]] = {CLOSED: [], OPEN: []}
    reports = {CLOSED: 0, OPEN: 0}
    with Server(args.base) as server, sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=os.environ["SPILLWAY_CHROMIUM"], args=ARGUMENTS)
        page = running.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_function(READY, timeout=180_000)
        page.evaluate(COUNT)
        process = psutil.Process(server.process.pid)
        must_succeed(server.run(prompt(args.steps, 0)))
        shown = CLOSED
        for number in range(2 * args.rounds):
            wanted = OPEN if number % 4 in (1, 2) else CLOSED
            if wanted != shown:
                page.evaluate(f"window.app.extensionManager.command.execute({TAB!r})")
                shown = wanted
            page.wait_for_timeout(SETTLE_MS)
            sent, before = page.evaluate("window.reports"), thread_seconds(process)
            run = server.run(prompt(args.steps, 1 + number))
            must_succeed(run)
            after = thread_seconds(process)
            taken = sorted(after[number] - before.get(number, 0.0) for number in after)
            seconds[wanted].append(duration(run))
            processor[wanted].append(sum(taken))
            beside[wanted].append(sum(taken[:-1]) / seconds[wanted][-1])
            reports[wanted] += page.evaluate("window.reports") - sent
            print(f"{wanted}: {seconds[wanted][-1]:.2f} s, {processor[wanted][-1]:.2f} s of processor", file=sys.stderr)
        running.close()
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


def prompt(steps: int, seed: int) -> dict[str, Any]:
    from kit.comfyui.running_server import node

    sampler = {"steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    wires = {"model": ["load", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    return {
        "load": node("SpillwayLoadDiffusionModel", unet_name="flux.safetensors", weight_dtype="default"),
        "clip": node("SpillwayLoadCLIP", clip_name1="clip.safetensors", type="stable_diffusion"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="a house"),
        "empty": node("EmptySD3LatentImage", width=256, height=256, batch_size=1),
        "sampled": node("KSampler", **wires, seed=seed, **sampler),
        "latent": node("SaveLatent", samples=["sampled", 0], filename_prefix="latent"),
    }


def must_succeed(run: dict[str, Any]) -> None:
    if run["status"]["status_str"] != "success":
        raise SystemExit(str(run["status"])[-1500:])


def duration(run: dict[str, Any]) -> float:
    """Return the seconds between a prompt's start and end, as the server saw them."""
    times = {name: data["timestamp"] for name, data in run["status"]["messages"]}
    return (times["execution_success"] - times["execution_start"]) / 1e3


# -- in the parent


def measure(args: argparse.Namespace, command: Any) -> comfyui.Outcome:
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
    parser.add_argument("--steps", type=int, default=16, help="of a prompt (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model (default %(default)s)")
    return comfyui.run(parser.parse_args(), run_contestant, measure)


if __name__ == "__main__":
    sys.exit(main())
