"""The output cache in little RAM, with real outputs: a limit of 4 GB, and 500 prompts in a row. Needs ComfyUI.

    python dev.py bench output_cache_ram --limit      # outputs of 12 GB in 4 GB: ours, and ComfyUI's own cache
    python dev.py bench output_cache_ram --soak       # 500 prompts of mixed workflows; takes minutes

The limit is a simulated one: a watcher kills the process when its private memory goes beyond 4 GB, as the system does
in a cgroup of that size. SPILLWAY_RAM_GB tells Spillway of it; a real cgroup it would find by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from harness import comfyui
from harness.laps import Laps
from harness.memory import Peak
from harness.pack import ROOT, load_pack
from harness.race import Contestant, must_have_run

GIB, MIB = 1 << 30, 1 << 20
LIMIT_GB = 4
SOAK_GB = 5  # room for one of the two checkpoints, and for some of the images
STEPS, STEP_MB = 24, 512
PROMPTS, SETTLED = 500, 50
LARGE = {"upscale_method": "bilinear", "width": 1024, "height": 1024, "crop": "disabled"}
OURS, COMFYUI = "Spillway", "ComfyUI"
LIMIT, SOAK = "limit", "soak"
STRETCH = 50  # prompts of a turn of the soak


# -- in ComfyUI's Python


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    runpy.run_path(str(ROOT / "prestartup_script.py"))  # as main.py does, before torch is imported
    comfyui.start_comfyui(args.comfyui, args.base)
    load_pack()
    logging.disable(logging.INFO)
    part, who = args.contestant.split(", ")
    if part == LIMIT:
        run_limit(laps, who)
    else:
        run_soak(laps, args.base)


def executor(who: str) -> Any:
    import execution

    from spillway.cache.comfyui import install

    if who == OURS:
        assert install.install()
    total = psutil.virtual_memory().total / GIB
    cache_args = {"lru": 0, "ram": min(10.0, max(2.0, total / 10)), "ram_inactive": min(128.0, total)}
    return execution.PromptExecutor(comfyui.Server(), execution.CacheType.RAM_PRESSURE, cache_args)


def run(running: Any, prompt: dict[str, Any], number: int, outputs: list[str]) -> None:
    asyncio.run(running.execute_async(prompt, str(number), {}, outputs))
    if not running.success:
        raise SystemExit(f"prompt {number} failed: {running.status_messages[-1][1].get('exception_message')}")


def run_limit(laps: Laps, who: str) -> None:
    """Run a chain of nodes whose outputs sum to 12 GB, each made from the one before."""
    import nodes
    import torch

    class Grow:
        RETURN_TYPES = ("IMAGE",)
        FUNCTION = "run"
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"step": ("INT", {})}, "optional": {"image": ("IMAGE", {})}}

        def run(self, step: int, image: Any = None) -> Any:
            output = torch.full((STEP_MB * MIB // 4,), float(step))
            if image is not None:
                assert image[0] == step - 1 and image[-1] == step - 1
            return (output,)

    nodes.NODE_CLASS_MAPPINGS["Grow"] = Grow
    prompt = {
        str(step): {
            "class_type": "Grow",
            "inputs": {"step": step, **({"image": [str(step - 1), 0]} if step else {})},
        }
        for step in range(STEPS)
    }
    running = executor(who)
    laps.begin(LIMIT)
    run(running, prompt, 0, [str(STEPS - 1)])
    laps.stop()
    engine = getattr(running.caches.outputs, "engine", None)
    laps.tell(evicted=engine and engine.evicted, evicted_bytes=engine and engine.freed_bytes)


def run_soak(laps: Laps, base: Path) -> None:
    """Run prompts of changing seeds, texts and sizes with two checkpoints, by ComfyUI's loader and ours in turns."""
    from kit.comfyui import checkpoints

    folder = base / "models" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        checkpoints.sd15(str(folder / f"{name}.safetensors"))
    import nodes
    import torch

    from spillway.nodes.load import SpillwayLoadCheckpoint

    nodes.NODE_CLASS_MAPPINGS["SpillwayLoadCheckpoint"] = SpillwayLoadCheckpoint
    SpillwayLoadCheckpoint.GET_SCHEMA()
    torch.set_num_threads(2)
    running = executor(OURS)
    for start in range(0, PROMPTS, STRETCH):
        rss, held, private = [], [], []
        laps.begin(SOAK)
        for number in range(start, start + STRETCH):
            run(running, soak_prompt(number), number, ["save"])
            if number % 10 == 9:
                gc.collect()
            info = psutil.Process().memory_info()
            rss.append(info.rss)
            private.append(info.rss - info.shared)
            held.append(running.caches.outputs.engine.ram_bytes())
        laps.stop()
        engine = running.caches.outputs.engine
        evicted = {"evicted": engine.evicted, "entries": len(engine.entries)}
        laps.tell(memory={"rss": rss, "private": private, "held": held}, **evicted)


def soak_prompt(number: int) -> dict[str, Any]:
    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    loader = "SpillwayLoadCheckpoint" if number % 4 == 3 else "CheckpointLoaderSimple"
    size = (32, 48, 64)[number // 5 % 3]
    return {
        "load": node(loader, ckpt_name="ab"[number // 20 % 2] + ".safetensors"),
        "pos": node("CLIPTextEncode", clip=["load", 1], text=f"a house {number // 3 % 40}"),
        "neg": node("CLIPTextEncode", clip=["load", 1], text="blurry"),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "sample": node(
            "KSampler",
            model=["load", 0],
            positive=["pos", 0],
            negative=["neg", 0],
            latent_image=["latent", 0],
            seed=number // 2,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "image": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "large": node(
            "ImageScale", image=["image", 0], upscale_method="bilinear", width=1536, height=1536, crop="disabled"
        ),
        "save": node("PreviewImage", images=["image", 0]),
        **(
            {"blur": node("ImageInvert", image=["large", 0]), "save": node("PreviewImage", images=["blur", 0])}
            if number % 9
            else {}
        ),
    }


# -- in the parent


class Watched:
    """A contestant whose private memory is watched, and which is killed when that goes beyond a limit in bytes."""

    def __init__(self, name: str, command: list[str], threads: int, ram_gb: int, limit: int | None = None) -> None:
        os.environ["SPILLWAY_RAM_GB"] = str(ram_gb)
        self.begun, self.limit, self.killed = time.monotonic(), limit, False
        self.contestant = Contestant(name, command, threads)
        self.watch = psutil.Process(self.contestant.process.pid)
        self.private = Peak(self.private_bytes, interval=0.005)

    def private_bytes(self) -> int:
        try:
            info = self.watch.memory_info()
        except psutil.NoSuchProcess:
            return 0
        private = info.rss - getattr(info, "shared", 0)
        if self.limit is not None and private > self.limit:
            self.killed = True
            self.contestant.process.kill()
        return private

    def __enter__(self) -> Watched:
        self.private.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.contestant.close()
        self.private.__exit__()

    def figures(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.begun
        return {"killed": self.killed, "peak_bytes": self.private.peak, "seconds": seconds}


def measure_limit(args: argparse.Namespace, command: Callable[[str], list[str]]) -> tuple[list[str], dict[str, Any]]:
    lines, results = [], {}
    for who in (OURS, COMFYUI):
        name = f"{LIMIT}, {who}"
        with Watched(name, command(name), args.threads, LIMIT_GB, LIMIT_GB * GIB) as run:
            lap = run.contestant.turn() or {}
        figures = results[who] = {**run.figures(), **{key: lap.get(key) for key in ("evicted", "evicted_bytes")}}
        end = "killed" if run.killed else "ran to its end" if lap else "failed"
        lines.append(
            f"{STEPS * STEP_MB // 1024} GB of outputs in {LIMIT_GB} GB, {who}: {end}, "
            f"peak {figures['peak_bytes'] / GIB:.2f} GiB, {figures['seconds']:.0f} s, evicted {figures['evicted']}"
        )
    return lines, results


def measure_soak(args: argparse.Namespace, command: Callable[[str], list[str]]) -> tuple[list[str], dict[str, Any]]:
    memory: dict[str, list[int]] = {"rss": [], "private": [], "held": []}
    name = f"{SOAK}, {OURS}"
    with Watched(name, command(name), args.threads, SOAK_GB) as run:
        while len(memory["rss"]) < PROMPTS:
            lap = run.contestant.turn()
            if lap is None:
                break
            for kind, values in lap["memory"].items():
                memory[kind] += values
            rss, held = (memory[kind][-1] / MIB for kind in ("rss", "held"))
            print(f"{len(memory['rss'])}: RSS {rss:,.0f} MiB, cache {held:,.0f} MiB", file=sys.stderr, flush=True)
    must_have_run(run.contestant)
    lines = []
    for kind, values in memory.items():
        first, last = values[SETTLED - 1], values[-1]
        lines.append(
            f"{kind}: {first / MIB:,.0f} MiB after {SETTLED} prompts, {last / MIB:,.0f} MiB after "
            f"{len(values)} ({last / first - 1:+.1%})"
        )
    every_tenth = {kind: values[::10] + values[-1:] for kind, values in memory.items()}
    ends = {key: run.contestant.last()[key] for key in ("evicted", "entries")}
    return lines, {**run.figures(), **every_tenth, **ends}


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    lines, results = [], {}
    for part, body in ((LIMIT, measure_limit), (SOAK, measure_soak)):
        if getattr(args, part):
            more, results[part] = body(args, command)
            lines += more
    return comfyui.Outcome(("\n".join(lines),), results)


def main() -> int:
    parser = comfyui.parser(__doc__)
    parser.add_argument("--limit", action="store_true", help="outputs of 12 GB in 4 GB")
    parser.add_argument("--soak", action="store_true", help="500 prompts in a row")
    args = parser.parse_args()
    if not (args.limit or args.soak):
        parser.error("choose --limit, --soak or both")
    return comfyui.run(args, run_contestant, measure)


if __name__ == "__main__":
    sys.exit(main())
