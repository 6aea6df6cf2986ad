"""torch.compile in ComfyUI: seconds to compile, seconds a step, and what compiles again when something changes.

    python dev.py bench compile_step
    python dev.py bench compile_step --hidden 768 --size 512 --json result.json

Runs in ComfyUI's own Python, found as for its tests. Every contestant is a process of its own with a model and an
empty compiler cache of its own, one after the other. Seconds of a step are medians, and given as CPU time of all its
threads, too, which other programs change less. A run that takes longer than --limit seconds is ended, and its row says
so.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness import comfyui, report
from harness.laps import Laps
from harness.pack import load_pack
from harness.race import Contestant, must_have_run

FILE, LORA = "flux.safetensors", "lora.safetensors"
COMFYUI, OURS = "ComfyUI", "Spillway"
UNCOMPILED = "ComfyUI, uncompiled"
# (name, whose loader, who compiles, resident fraction)
CONTESTANTS = {
    UNCOMPILED: (COMFYUI, None, None),
    "ComfyUI, TorchCompileModel": (COMFYUI, "ComfyUI's node", None),
    "ComfyUI, our node, blocks": (COMFYUI, "blocks", None),
    "Spillway, uncompiled": (OURS, None, 1.0),
    "Spillway, our node": (OURS, "blocks", 1.0),
    "Spillway 25 %, our node": (OURS, "blocks", 0.25),
}
WARM_UP = ("first image", "batch of 2")
# What changes from image to image: (words, LoRA's strength, batch, width to height, part of its budget)
SCRIPT = (
    ("LoRA on", 0.5, 1, 1.0, 1.0),
    ("LoRA stronger", 1.0, 1, 1.0, 1.0),
    ("LoRA off", 0.0, 1, 1.0, 1.0),
    ("half the budget", 0.0, 1, 1.0, 0.5),
    ("wider", 0.0, 1, 1.5, 0.5),
    ("batch of 3", 0.0, 3, 1.0, 0.5),
)
STEPS = 2  # of each image

# -- in ComfyUI's Python


def write_files(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    from kit.comfyui import checkpoints

    with laps.lap("write"):
        model = checkpoints.flux(str(args.base / FILE), hidden=args.hidden)
        checkpoints.lora(str(args.base / LORA), model, rank=16)


def compiled(model: Any, who: str | None) -> Any:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    from spillway.nodes.compile import SpillwayLazyTorchCompile

    if who is None:
        return model
    if who == "ComfyUI's node":
        return TorchCompileModel.execute(model, "inductor").args[0]
    settings = {"compile_transformer_blocks_only": who == "blocks", "dynamo_cache_size_limit": 640}
    return SpillwayLazyTorchCompile.execute(
        model,
        "inductor",
        False,
        "default",
        "true",
        use_guard_filter=True,
        disable_dynamic_vram=True,
        log_compile=True,
        **settings,
    ).args[0]


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils

    from kit.comfyui import sampling

    load_pack()
    from spillway.ops.compile.compiled_function import compile_count
    from spillway.patcher.comfyui.loading.load import load_diffusion_model
    from spillway.patcher.policy import Policy

    loader, who, fraction = CONTESTANTS[args.contestant]
    torch.set_num_threads(args.threads)
    path = str(args.base / FILE)
    with torch.inference_mode():
        model: Any = comfy.sd.load_diffusion_model(path) if loader == COMFYUI else load_diffusion_model(path)
        model = compiled(model, who)
        lora = comfy.utils.load_torch_file(str(args.base / LORA))

        def image(
            strength: float, batch: int, wide: float, share: float, steps: int = STEPS
        ) -> list[tuple[float, float]]:
            """Return the seconds of each step, and of its CPU time."""
            clone, times = model.clone(), []
            if fraction is not None:
                total = model.dynamic.total_bytes
                clone.set_policy(Policy(vram_bytes=int(total * fraction * share), pinned_bytes=2 * total))
            if strength:
                clone, _ = comfy.sd.load_lora_for_models(clone, None, lora, strength, 0)
            began, began_cpu = time.perf_counter(), time.process_time()

            def after_step(*_: Any) -> None:
                nonlocal began, began_cpu
                times.append((time.perf_counter() - began, time.process_time() - began_cpu))
                began, began_cpu = time.perf_counter(), time.process_time()

            size = {"width": int(args.size * wide) // 16 * 16, "height": args.size, "batch": batch}
            sampling.sample(clone, steps=steps, callback=after_step, **size)
            return times

        def change(words: str, *settings: Any) -> None:
            before, start = compile_count(), time.perf_counter()
            laps.begin(words)
            times = image(*settings)
            laps.stop()
            laps.tell(graphs=compile_count() - before, steps=times, took=time.perf_counter() - start)

        change(WARM_UP[0], 0.0, 1, 1.0, 1.0)
        change(WARM_UP[1], 0.0, 2, 1.0, 1.0)
        laps.begin("steps")
        times = image(0.0, 1, 1.0, 1.0, 1 + args.steps)[1:]
        laps.stop()
        laps.tell(steps=times)
        for words, *settings in SCRIPT:
            change(words, *settings)


# -- in the parent


def limited(name: str, command: list[str], args: argparse.Namespace) -> Contestant:
    """Run one contestant alone until it is through, fails, or has had its time."""
    with tempfile.TemporaryDirectory(prefix="spillway-compile-cache-") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        contestant = Contestant(name, command, args.threads)
        start = time.perf_counter()
        try:
            for _ in range(len(WARM_UP) + 1 + len(SCRIPT)):
                if contestant.turn() is None or time.perf_counter() - start > args.limit:
                    break
        finally:
            contestant.close()
    return contestant


def row(contestant: Contestant) -> dict[str, Any]:
    by_name = {lap["lap"]: lap for lap in contestant.laps}
    steps = by_name.get("steps", {}).get("steps", [])
    step, cpu = (statistics.median(clock) for clock in zip(*steps, strict=True)) if steps else (None, None)
    changes = {words: by_name[words] for words, *_ in SCRIPT if words in by_name}
    warm = [by_name[words] for words in WARM_UP if words in by_name]
    return {
        "step_s": step,
        "step_cpu_s": cpu,
        "first_image_s": warm[0]["took"] if warm else None,
        "warm_up_graphs": sum(lap["graphs"] for lap in warm),
        "warm_up_s": sum(lap["took"] for lap in warm),
        "script_graphs": {words: lap["graphs"] for words, lap in changes.items()},
        "script_s": {words: lap["took"] for words, lap in changes.items()},
        "script_finished": len(changes) == len(SCRIPT),
        "peak_rss": contestant.last().get("peak_rss"),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    def again(found: Mapping[str, Any]) -> str:
        words = [f"{count} ({name})" for name, count in found["script_graphs"].items() if count]
        return (", ".join(words) or "0") + ("" if found["script_finished"] else ", not finished")

    reference = rows[UNCOMPILED]["step_cpu_s"]
    columns: dict[str, Any] = {
        "step, s": lambda found: report.number(found["step_s"], "{:.3f}"),
        "CPU s": lambda found: report.number(found["step_cpu_s"], "{:.3f}"),
        "/ ComfyUI uncompiled": lambda found: report.number(found["step_cpu_s"] and found["step_cpu_s"] / reference),
        "first image, s": lambda found: report.number(found["first_image_s"], "{:.1f}"),
        "+ batch of 2, s": lambda found: report.number(found["warm_up_s"], "{:.1f}"),
        "graphs": lambda found: str(found["warm_up_graphs"]),
        "script, s": lambda found: report.number(sum(found["script_s"].values()), "{:.1f}"),
        "graphs in the script": again,
    }
    lines = [(name, *[show(found) for show in columns.values()]) for name, found in rows.items()]
    return report.table(("", *columns), lines)


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    nbytes = (args.base / FILE).stat().st_size
    runs = {name: limited(name, command(name), args) for name in CONTESTANTS}
    must_have_run(*runs.values())
    rows = {name: row(contestant) for name, contestant in runs.items()}
    words = f"{args.size} x {args.size}, {args.threads} threads, in ComfyUI, which computes in fp32 here"
    about = f"Flux, {nbytes / 1e6:.0f} MB in bf16, 2 double and 2 single blocks; {words}"
    script = [words for words, *_ in SCRIPT]
    return comfyui.Outcome(
        (about, table(rows)), {"file_bytes": nbytes, "size": args.size, "script": script, "results": rows}
    )


def main() -> int:
    parser = comfyui.parser(__doc__)
    comfyui.add_flux(parser, 512, "512 is 57 MB (default)", size=256)
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default %(default)s)")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one contestant (default %(default)s)")
    return comfyui.run(parser.parse_args(), run_contestant, measure, write=write_files)


if __name__ == "__main__":
    sys.exit(main())
