"""A Flux from a GGUF file, beside ComfyUI-GGUF: loading, memory, steps, and what a LoRA costs; on the CPU.

    python dev.py bench gguf --pack FOLDER                 # FOLDER: a checkout of ComfyUI-GGUF. A file of 2 GB to load
    python dev.py bench gguf --pack FOLDER --hidden 512 --load-depth 1    # small ones, to see that it runs
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench gguf --pack FOLDER --json result.json

Runs in ComfyUI's own Python, found as for its tests; on a CPU ComfyUI computes in fp32. Every contestant is a process
of its own. All that sample take turns: each ratio is of two steps of the same round. Loading is measured with a larger
file, by processes that do nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness import comfyui, report
from harness.laps import Laps
from harness.pack import load_pack
from harness.race import Contestant, difference, must_have_run, race, read_into_cache, slug, solo

PACK, OURS, STREAMED = "ComfyUI-GGUF", "Spillway", "Spillway 0 %"
LORA = " + LoRA"
NAMES = [name + lora for name in (PACK, OURS, STREAMED) for lora in ("", LORA)]
LOADS = [f"{name}, load" for name in (PACK, OURS)]
SETTLE = 3  # load, first step, and a second that uses what the first one learned
KIND = "Q4_K"
SAMPLED, LOADED, LORA_FILE = "flux.gguf", "large.gguf", "lora.safetensors"
WIDE, SINGLE = 3072, 15  # of the file to load: 2 GB at a depth of 4

# -- in ComfyUI's Python


def write_files(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    load_pack()
    import comfy.utils

    from kit.comfyui import checkpoints
    from kit.comfyui.checkpoints.diffusion_models import flux_entries
    from kit.gguf_files import quantised_copy, random_blocks, write_gguf
    from spillway.ops.gguf.types import IDS, TYPES

    with laps.lap("write"):
        folder = models(args.base)
        folder.mkdir(parents=True)
        plain = checkpoints.flux(str(args.base / "plain.safetensors"), hidden=args.hidden, depth=2, depth_single=4)
        write_gguf(folder / SAMPLED, quantised_copy(comfy.utils.load_torch_file(plain), KIND)[0])
        checkpoints.lora(str(args.base / LORA_FILE), plain, rank=16)
        per_block = TYPES[IDS[KIND]].numbers
        pool = random_blocks(KIND, WIDE * 7 * WIDE)
        tensors: dict[str, Any] = {}
        for name, (shape, *_) in flux_entries(torch.float16, WIDE, args.load_depth, SINGLE).items():
            if len(shape) == 2 and shape[1] % per_block == 0:
                count = shape[0] * shape[1] // per_block
                tensors[name] = (KIND, shape, pool[:count])
            else:
                tensors[name] = torch.zeros(shape, dtype=torch.float16)
        write_gguf(folder / LOADED, tensors)


def models(base: Path) -> Path:
    return base / "models" / "diffusion_models"


def pack_nodes(folder: Path, site: Path) -> Any:
    """Import the pack's nodes as ComfyUI does. site: holds the package `gguf`, if ComfyUI's Python lacks it."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.path.append(str(site))
    package = types.ModuleType("comfyui_gguf")
    package.__path__ = [str(folder)]
    sys.modules["comfyui_gguf"] = package
    return importlib.import_module("comfyui_gguf.nodes")


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load by the node, and run ComfyUI's sampler once, a turn for each step."""
    comfyui.start_comfyui(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils

    name = args.contestant
    theirs = name.startswith(PACK)
    if theirs:
        nodes = pack_nodes(args.pack, args.base / "site")
    else:
        comfyui.load_installed_pack()
        from spillway.nodes.load import SpillwayLoadDiffusionModel
        from spillway.patcher.policy import Policy
    torch.set_num_threads(args.threads)

    def load(file: str) -> Any:
        if theirs:
            return nodes.UnetLoaderGGUF().load_unet(file)[0]
        policy = Policy(vram_bytes=0) if name.startswith(STREAMED) else None
        return SpillwayLoadDiffusionModel.execute(file, "default", policy).result[0]

    with torch.inference_mode():
        with laps.lap("load"):
            model = load(LOADED if name in LOADS else SAMPLED)
            if name.endswith(LORA):
                lora = comfy.utils.load_torch_file(str(args.base / LORA_FILE))
                model, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0)
        if name not in LOADS:
            latents = comfyui.sample_in_turns(laps, model, args, dict)
            torch.save(latents, args.base / f"{slug(name)}.pt")


# -- in the parent


def provide_gguf(base: Path) -> None:
    """Let contestants find the package `gguf` of this Python."""
    found = importlib.metadata.distribution("gguf").locate_file("gguf")
    (base / "site").mkdir()
    (base / "site" / "gguf").symlink_to(Path(str(found)), target_is_directory=True)


def grown(run: Contestant, what: str) -> int:
    last = run.last()
    return int(last[f"peak_{what}"] - last[f"begun_{what}"])


def load_figures(run: Contestant) -> dict[str, Any]:
    return {
        "load_s": run.seconds("load")[0],
        "peak_private_growth_bytes": grown(run, "anonymous"),
        "peak_rss_growth_bytes": grown(run, "rss"),
    }


def step_figures(runs: Mapping[str, Contestant], folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name, run in runs.items():
        steps, bare = run.seconds("step")[1:], runs[name.removesuffix(LORA)]
        theirs = runs[PACK + (LORA if name.endswith(LORA) else "")]
        found[name] = {
            "load_s": run.seconds("load")[0],
            "first_step_s": run.seconds("first")[0],
            "steps_s": report.median(steps),
            "steps_cpu_s": report.median(run.seconds("step", "cpu_seconds")[1:]),
            "steps_s_to_no_lora": report.ratio(steps, bare.seconds("step")[1:]),
            "steps_cpu_s_to_no_lora": report.ratio(
                run.seconds("step", "cpu_seconds")[1:], bare.seconds("step", "cpu_seconds")[1:]
            ),
            "steps_s_to_pack": report.ratio(steps, theirs.seconds("step")[1:]),
            "peak_private_growth_bytes": grown(run, "anonymous"),
            "max_abs_difference": difference(folder / f"{slug(name)}.pt", folder / f"{slug(theirs.name)}.pt"),
        }
    return found


def load_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("", "load, s", "private memory, MB", "all memory, MB")
    return report.table(
        columns,
        [
            (
                name,
                report.number(row["load_s"]),
                report.megabytes(row["peak_private_growth_bytes"]),
                report.megabytes(row["peak_rss_growth_bytes"]),
            )
            for name, row in rows.items()
        ],
    )


def step_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "load, s": lambda row: report.number(row["load_s"]),
        "first step, s": lambda row: report.number(row["first_step_s"]),
        "later step, s": lambda row: report.number(row["steps_s"]),
        "/ ComfyUI-GGUF": lambda row: report.number(row["steps_s_to_pack"]),
        "/ no LoRA": lambda row: report.number(row["steps_s_to_no_lora"], "{:.3f}"),
        "CPU / no LoRA": lambda row: report.number(row["steps_cpu_s_to_no_lora"], "{:.3f}"),
        "private memory, MB": lambda row: report.megabytes(row["peak_private_growth_bytes"]),
        "max diff": lambda row: f"{row['max_abs_difference']:g}",
    }
    return report.table(
        ("", *columns), [(name, *[show(row) for show in columns.values()]) for name, row in rows.items()]
    )


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    provide_gguf(args.base)
    sampled, loaded = (models(args.base) / name for name in (SAMPLED, LOADED))
    sizes = [path.stat().st_size for path in (sampled, loaded)]
    loads: dict[str, list[dict[str, Any]]] = {name: [] for name in LOADS}
    for _ in range(args.loads):
        for name in LOADS:
            read_into_cache(loaded)
            run = solo(name, command(name), 1, args.threads)
            must_have_run(run)
            loads[name].append(load_figures(run))
    medians = {
        name: {key: report.median([each[key] for each in found]) for key in found[0]} for name, found in loads.items()
    }
    loaded.unlink()
    read_into_cache(sampled)
    runs = race({name: command(name) for name in NAMES}, args.rounds, args.threads, settle=SETTLE)
    must_have_run(*runs.values())
    rows = step_figures(runs, args.base)
    words = f"{args.threads} threads, in ComfyUI, which computes in fp32"
    about = (
        f"Loading a Flux of {sizes[1] / 1e9:.2f} GB in {KIND}; median of {args.loads}",
        load_table(medians),
        f"A Flux of {sizes[0] / 1e9:.2f} GB in {KIND}, LoRA of rank 16, {args.size} x {args.size}; {words}",
        step_table(rows),
    )
    figures = {"file_bytes": sizes, "size": args.size, "loads": loads, "results": rows}
    return comfyui.Outcome(about, figures)


def main() -> int:
    parser = comfyui.parser(__doc__)
    comfyui.add_flux(parser, 1536, "1536 is 0.18 GB (default)", size=256)
    parser.add_argument("--pack", type=Path, required=True, help="a checkout of ComfyUI-GGUF")
    parser.add_argument(
        "--load-depth", type=int, default=4, help="double blocks of the file to load: 4 is 2 GB (default)"
    )
    parser.add_argument("--loads", type=int, default=3, help="loads of each contestant")
    parser.add_argument("--rounds", type=int, default=5, help="later steps of each contestant, in turns")
    args = parser.parse_args()
    args.steps = SETTLE - 1 + args.rounds  # of one run of the sampler
    return comfyui.run(args, run_contestant, measure, write=write_files)


if __name__ == "__main__":
    sys.exit(main())
