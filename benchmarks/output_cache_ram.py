"""The output cache in little RAM, with real outputs: a limit of 4 GB, and 500 prompts in a row. Needs ComfyUI.

    python dev.py bench output_cache_ram --limit      # outputs of 12 GB in 4 GB: ours, and the core's own cache
    python dev.py bench output_cache_ram --soak       # 500 prompts of mixed workflows; takes minutes

The limit is a simulated one: a watcher kills the process when its private memory goes beyond 4 GB, as the system does
in a cgroup of that size. SPILLWAY_RAM_GB tells Spillway of it; a real cgroup it would find by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report as report
import psutil
from _host import find_host, start_core
from _pack import ROOT, load_pack

GIB, MIB = 1 << 30, 1 << 20
LIMIT_GB = 4
SOAK_GB = 5  # room for one of the two checkpoints, and for some of the images
STEPS, STEP_MB = 24, 512
PROMPTS, SETTLED = 500, 50
LARGE = {"upscale_method": "bilinear", "width": 1024, "height": 1024, "crop": "disabled"}
OURS, CORE = "Spillway", "core"


class Server:
    """What the executor asks of a server that nobody is connected to."""

    client_id = None
    last_node_id = None

    def send_sync(self, *_: Any) -> None:
        pass


# -- in ComfyUI's Python


def executor(contestant: str) -> Any:
    import execution

    from spillway.cache.comfyui import install

    if contestant == OURS:
        assert install.install()
    total = psutil.virtual_memory().total / GIB
    cache_args = {"lru": 0, "ram": min(10.0, max(2.0, total / 10)), "ram_inactive": min(128.0, total)}
    return execution.PromptExecutor(Server(), execution.CacheType.RAM_PRESSURE, cache_args)


def run(running: Any, prompt: dict[str, Any], number: int, outputs: list[str]) -> None:
    asyncio.run(running.execute_async(prompt, str(number), {}, outputs))
    if not running.success:
        raise SystemExit(f"prompt {number} failed: {running.status_messages[-1][1].get('exception_message')}")


def run_limit(contestant: str) -> dict[str, Any]:
    """A chain of nodes whose outputs sum to 12 GB, each made from the one before."""
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
            made = torch.full((STEP_MB * MIB // 4,), float(step))
            if image is not None:
                assert image[0] == step - 1 and image[-1] == step - 1
            return (made,)

    nodes.NODE_CLASS_MAPPINGS["Grow"] = Grow
    prompt = {
        str(step): {
            "class_type": "Grow",
            "inputs": {"step": step, **({"image": [str(step - 1), 0]} if step else {})},
        }
        for step in range(STEPS)
    }
    running = executor(contestant)
    run(running, prompt, 0, [str(STEPS - 1)])
    engine = getattr(running.caches.outputs, "engine", None)
    return {"evicted": engine.evicted if engine else None, "evicted_bytes": engine.freed_bytes if engine else None}


def run_soak(base: Path) -> dict[str, Any]:
    """Seeds, texts, sizes, two checkpoints, the core's loader and ours, in turns."""
    import checkpoints

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
    rss, held, private = [], [], []
    for number in range(PROMPTS):
        run(running, soak_prompt(number), number, ["save"])
        if number % 10 == 9:
            gc.collect()
        info = psutil.Process().memory_info()
        rss.append(info.rss)
        private.append(info.rss - info.shared)
        held.append(running.caches.outputs.engine.ram_bytes())
        if number % 50 == 49:
            words = f"{number + 1}: RSS {rss[-1] / MIB:,.0f} MiB, cache {held[-1] / MIB:,.0f} MiB"
            print(words, file=sys.stderr, flush=True)
    engine = running.caches.outputs.engine
    return {"rss": rss, "private": private, "held": held, "evicted": engine.evicted, "entries": len(engine.entries)}


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


def watched(command: list[str], environment: dict[str, str], limit: int | None) -> dict[str, Any]:
    """Run a command; kill it when its private memory goes beyond the limit, in bytes."""
    begun, peak, killed = time.monotonic(), 0, False
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        watch = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                info = watch.memory_info()
            except psutil.NoSuchProcess:
                break
            peak = max(peak, info.rss - getattr(info, "shared", 0))
            if limit is not None and peak > limit:
                process.send_signal(signal.SIGKILL)
                killed = True
                break
            time.sleep(0.005)
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
    return {"code": code, "killed": killed, "peak_bytes": peak, "seconds": time.monotonic() - begun}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", action="store_true", help="outputs of 12 GB in 4 GB")
    parser.add_argument("--soak", action="store_true", help="500 prompts in a row")
    parser.add_argument("--json", type=Path, help="write all figures here")
    for hidden in ("--inside", "--base", "--result"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        runpy.run_path(str(ROOT / "prestartup_script.py"))  # as main.py does
        start_core(args.inside, args.base)
        load_pack()
        logging.disable(logging.INFO)
        found = run_limit(args.contestant) if args.limit else run_soak(args.base)
        args.result.write_text(json.dumps(found))
        return 0
    if not (args.limit or args.soak):
        parser.error("choose --limit, --soak or both")
    comfyui, python = find_host()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="spillway-cache-") as folder:
        told = ["--inside", str(comfyui), "--base", folder, "--result", str(Path(folder) / "result.json")]

        def child(contestant: str, part: str, limit: int | None) -> dict[str, Any]:
            environment = {"SPILLWAY_RAM_GB": str(SOAK_GB if limit is None else LIMIT_GB)}
            result = Path(folder) / "result.json"
            result.unlink(missing_ok=True)
            command = [str(python), __file__, part, "--contestant", contestant, *told]
            seen = watched(command, environment, limit)
            return {**seen, **(json.loads(result.read_text()) if result.exists() else {})}

        if args.limit:
            found["limit"] = {name: child(name, "--limit", LIMIT_GB * GIB) for name in (OURS, CORE)}
            for name, run_ in found["limit"].items():
                end = "killed" if run_["killed"] else "ran to its end" if run_["code"] == 0 else "failed"
                print(
                    f"{STEPS * STEP_MB // 1024} GB of outputs in {LIMIT_GB} GB, {name}: {end}, "
                    f"peak {run_['peak_bytes'] / GIB:.2f} GiB, {run_['seconds']:.0f} s, evicted {run_.get('evicted')}"
                )
        if args.soak:
            soak = found["soak"] = child(OURS, "--soak", None)
            for name in ("rss", "private", "held"):
                first, last = soak[name][SETTLED - 1], soak[name][-1]
                print(
                    f"{name}: {first / MIB:,.0f} MiB after {SETTLED} prompts, {last / MIB:,.0f} MiB after "
                    f"{len(soak[name])} ({last / first - 1:+.1%})"
                )
            for name in ("rss", "private", "held"):
                soak[name] = soak[name][::10] + soak[name][-1:]
    if args.json:
        report.write(args.json, report.result(**found, host=report.host_versions(comfyui, python)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
