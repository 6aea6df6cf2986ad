"""ComfyUI's loaders and Spillway's over every kind of file, each with and without a LoRA; on the CPU.

    python dev.py bench loader_files                               # all rows; 2.5 GB of disk, an hour on two cores
    python dev.py bench loader_files --only flux --only "wan bf16"  # the rows whose name begins so
    python dev.py bench loader_files --only "flux fp8" --starts 1   # to see that it runs

Runs in ComfyUI's own Python, found as for its tests. Each contestant is a process of its own: it loads the file, puts
the LoRA on, and samples; of SD 1.5, a whole checkpoint, it encodes the text first and decodes the latents last. "load +
first" is what a user waits for until the first step is done. "anonymous" is the memory that is the process's own: what
it read from the file and left there is the page cache's.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from comfyui_loader import REFERENCE, SETTLE, figures, summary, table

from harness import comfyui
from harness.laps import Laps
from harness.loader_rows import ROWS, Row, file_of, lora_of, write
from harness.race import difference, must_have_run, race, read_into_cache, slug
from harness.turns import rotated

OURS = "Spillway"
PROMPT = "a house at a lake, in the evening"


def rows_of(args: argparse.Namespace) -> list[Row]:
    found = [row for row in ROWS if not args.only or any(str(row).startswith(name) for name in args.only)]
    return found or sys.exit(f"no row begins so; there are: {', '.join(map(str, ROWS))}")


# -- in ComfyUI's Python


def write_files(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    with laps.lap("write"):
        for row in rows_of(args):
            write(row, args.base)


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load by the node and run ComfyUI's sampler once, a turn for each step."""
    comfyui.start_comfyui(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils
    import nodes

    from kit.comfyui import checkpoints, sampling

    name, who = args.contestant.split(" | ")
    row = next(row for row in ROWS if str(row) == name)
    checkpoints.accept_small_lumina()
    if who == OURS:
        comfyui.load_installed_pack()
        from spillway.nodes.load import SpillwayLoadCheckpoint, SpillwayLoadDiffusionModel

    torch.set_num_threads(args.threads)
    path = file_of(row, args.base)

    def load() -> tuple[Any, Any, Any]:
        if row.whole:
            if who == OURS:
                return SpillwayLoadCheckpoint.execute(path.name).result[:3]
            return nodes.CheckpointLoaderSimple().load_checkpoint(path.name)
        if who == OURS:
            return *SpillwayLoadDiffusionModel.execute(path.name, "default").result, None, None
        return *nodes.UNETLoader().load_unet(path.name, "default"), None, None

    gc.collect()  # else a full collection, of 0.2 s, hits whoever makes the one object too many after the imports
    with torch.inference_mode():
        with laps.lap("load"):
            model, clip, vae = load()
            if row.lora:
                lora = comfy.utils.load_torch_file(str(lora_of(row, args.base)), safe_load=True)
                model, clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)

        def conds() -> Any:
            if clip is None:
                return sampling.conds(model)
            return tuple(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, ""))

        latents = comfyui.sample_in_turns(laps, model, args, dict, conds=conds)
        torch.save(latents, args.base / f"{slug(args.contestant)}.pt")
        if vae is not None:
            with laps.lap("decode"):
                vae.decode(latents)


# -- in the parent


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    lines, found = [], {}
    for row in rows_of(args):
        entries = [one_race(args, command, row, start) for start in range(args.starts)]
        results = summary({str(row): entries})
        ours, comfyuis = results[str(row)], results[REFERENCE]
        path = file_of(row, args.base)
        found[str(row)] = {"file_bytes": path.stat().st_size, "ours": ours, "comfyui": comfyuis, "races": entries}
        shown = table({f"{row}, ComfyUI": comfyuis, f"{row}, {OURS}": ours})
        lines.append(shown if not lines else "\n".join(shown.splitlines()[2:]))
        print(shown.splitlines()[-1], file=sys.stderr, flush=True)
    about = (
        f"{args.size} x {args.size}, {args.threads} threads, medians of {args.starts} starts; in brackets: to ComfyUI"
    )
    return comfyui.Outcome((about, *lines), {"size": args.size, "starts": args.starts, "results": found})


def one_race(args: argparse.Namespace, command: Callable[[str], list[str]], row: Row, start: int) -> dict[str, Any]:
    """Race both over one file; return the figures of each and the largest difference of their latents."""
    names = {who: f"{row} | {who}" for who in rotated([REFERENCE, OURS], start)}
    read_into_cache(file_of(row, args.base))
    rounds = args.rounds + (1 if row.whole else 0)  # the last is the decoder's
    runs = race({name: command(name) for name in names.values()}, rounds, args.threads, settle=SETTLE)
    must_have_run(*runs.values())
    latents = [args.base / f"{slug(name)}.pt" for name in names.values()]
    both = {key: figures(runs[names[who]]) for key, who in (("ours", OURS), ("comfyui", REFERENCE))}
    return {**both, "difference": difference(*latents)}


def main() -> int:
    parser = comfyui.parser(__doc__)
    parser.add_argument(
        "--only", action="append", metavar="BEGINNING", help="rows whose name begins so; may be repeated"
    )
    parser.add_argument("--size", type=int, default=256, help="pixels per side (default %(default)s)")
    parser.add_argument("--starts", type=int, default=5, help="fresh processes of both, for each row")
    parser.add_argument("--rounds", type=int, default=3, help="later steps of each start, in turns")
    args = parser.parse_args()
    args.steps = SETTLE - 1 + args.rounds  # of one run of the sampler
    return comfyui.run(args, run_contestant, measure, write=write_files)


if __name__ == "__main__":
    sys.exit(main())
