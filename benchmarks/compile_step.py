"""torch.compile in ComfyUI: seconds to compile, seconds a step, and what compiles again when something changes.

    python dev.py bench compile_step
    python dev.py bench compile_step --hidden 768 --size 512 --json result.json

Runs in ComfyUI's own Python, found as for the host tests. Every contestant is a process of its own with a model and an
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report as report
import torch
from _host import contestant_parser, find_host, start_core
from _pack import load_pack
from _race import Contestant, Laps, contest

FILE, LORA = "flux.safetensors", "lora.safetensors"
CORE, OURS = "core", "Spillway"
# (name, whose loader, who compiles, resident fraction)
CONTESTANTS = {
    "core, uncompiled": (CORE, None, None),
    "core, TorchCompileModel": (CORE, "core's node", None),
    "core, our node, blocks": (CORE, "blocks", None),
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
    start_core(args.comfyui, args.base)
    import checkpoints

    with laps.lap("write"):
        model = checkpoints.flux(str(args.base / FILE), hidden=args.hidden)
        checkpoints.lora(str(args.base / LORA), model, rank=16)


def compiled(model: Any, who: str | None) -> Any:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    from spillway.nodes.compile import INT8LazyTorchCompile

    if who is None:
        return model
    if who == "core's node":
        return TorchCompileModel.execute(model, "inductor").args[0]
    settings = {"compile_transformer_blocks_only": who == "blocks", "dynamo_cache_size_limit": 640}
    return INT8LazyTorchCompile.execute(
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
    start_core(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils
    import sampling

    load_pack()
    from spillway.ops.compile.compiled_function import compile_count
    from spillway.patcher.comfyui.loading.load import load_diffusion_model
    from spillway.patcher.policy import Policy

    loader, who, fraction = CONTESTANTS[args.contestant]
    torch.set_num_threads(args.threads)
    path = str(args.base / FILE)
    with torch.inference_mode():
        model: Any = comfy.sd.load_diffusion_model(path) if loader == CORE else load_diffusion_model(path)
        model = compiled(model, who)
        lora = comfy.utils.load_torch_file(str(args.base / LORA))

        def image(
            strength: float, batch: int, wide: float, share: float, steps: int = STEPS
        ) -> list[tuple[float, float]]:
            """Seconds of each step, and of CPU time."""
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


def run(name: str, command: list[str], args: argparse.Namespace) -> Contestant:
    """One contestant's laps, until it is through, fails, or has had its time."""
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

    reference = rows["core, uncompiled"]["step_cpu_s"]
    columns: dict[str, Any] = {
        "step, s": lambda found: report.number(found["step_s"], "{:.3f}"),
        "CPU s": lambda found: report.number(found["step_cpu_s"], "{:.3f}"),
        "/ core uncompiled": lambda found: report.number(found["step_cpu_s"] and found["step_cpu_s"] / reference),
        "first image, s": lambda found: report.number(found["first_image_s"], "{:.1f}"),
        "+ batch of 2, s": lambda found: report.number(found["warm_up_s"], "{:.1f}"),
        "graphs": lambda found: str(found["warm_up_graphs"]),
        "script, s": lambda found: report.number(sum(found["script_s"].values()), "{:.1f}"),
        "graphs in the script": again,
    }
    lines = [(name, *[show(found) for show in columns.values()]) for name, found in rows.items()]
    return report.table(("", *columns), lines)


def parse() -> argparse.Namespace:
    parser = contestant_parser(__doc__, 512, "512 is 57 MB (default)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default %(default)s)")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one contestant (default %(default)s)")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.contestant:
        return contest(lambda laps: (write_files if args.contestant == "write" else run_contestant)(args, laps))
    args.comfyui, python = find_host()

    def command(name: str) -> list[str]:
        told = ("--base", args.base, "--comfyui", args.comfyui, "--hidden", args.hidden, "--size", args.size)
        return [
            str(part)
            for part in (
                python,
                __file__,
                "--contestant",
                name,
                *told,
                "--steps",
                args.steps,
                "--threads",
                args.threads,
            )
        ]

    with tempfile.TemporaryDirectory(prefix="spillway-compile-") as folder:
        args.base = Path(folder)
        written = Contestant("write", command("write"), args.threads)
        written.turn()
        written.close()
        if written.failed is not None:
            sys.exit(f"the files could not be written: {written.failed}")
        nbytes = (args.base / FILE).stat().st_size
        runs = {name: run(name, command(name), args) for name in CONTESTANTS}
        for contestant in runs.values():
            if contestant.failed is not None:
                sys.exit(f"{contestant.name} failed: {contestant.failed}")
        rows = {name: row(contestant) for name, contestant in runs.items()}
    words = f"{args.size} x {args.size}, {args.threads} threads, in ComfyUI, which computes in fp32 here"
    print(f"\nFlux, {nbytes / 1e6:.0f} MB in bf16, 2 double and 2 single blocks; {words}\n")
    print(table(rows))
    if args.json:
        more = {"file_bytes": nbytes, "size": args.size, "script": [words for words, *_ in SCRIPT]}
        report.write(args.json, report.result(**more, host=report.host_versions(args.comfyui, python), results=rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
