"""A model that a card cannot hold: ComfyUI with and without dynamic VRAM, and Spillway, in ComfyUI on a real card.

    python dev.py bench card                                   # a Flux of 24 GB in bf16 where 8 GB are free
    python dev.py bench card --free-gb 12 --lora 32            # with a LoRA of rank 32
    python dev.py bench card --dtype fp8                       # 12 GB
    TMPDIR=/dev/shm python dev.py bench card --json result.json

Another process takes memory of the card until `--free-gb` are left, and torch says that it has no more in all. Each
contestant is a process of its own, alone on the rest. The limit is the longer of two: a step with all weights on the
card, and the time that the bus takes for what cannot be there, which is the model's bytes less the free ones, at the
speed of one copy from page-locked memory, measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness import comfyui, report
from harness.laps import Laps
from harness.race import difference, slug, solo

FILE, LORA = "flux.safetensors", "lora.safetensors"
RESIDENT = "ComfyUI, whole card"
CONTEXT, POOLED, TOKENS = 4096, 768, 512
GB = 10**9


class Setup(NamedTuple):
    """dynamic_vram: ComfyUI's, by comfy-aimdo. pack: models are loaded by our node."""

    dynamic_vram: bool
    pack: bool


CONTESTANTS = {
    RESIDENT: Setup(False, False),
    "ComfyUI, dynamic VRAM": Setup(True, False),
    "ComfyUI, without": Setup(False, False),
    "Spillway, dynamic VRAM": Setup(True, True),
    "Spillway, without": Setup(False, True),
}

# Prints the card's name and the bus's bytes a second each way. Then it takes all but what is to be free.
HOLDER = """
import json, sys, time, torch
left = int(sys.argv[1])
host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
card = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
def rate(to, source):
    best = 0
    for _ in range(6):
        torch.cuda.synchronize(); began = time.perf_counter()
        to.copy_(source, non_blocking=True); torch.cuda.synchronize()
        best = max(best, (1 << 30) / (time.perf_counter() - began))
    return best
found = {"to_card": rate(card, host), "from_card": rate(host, card), "name": torch.cuda.get_device_name()}
del host, card
torch.cuda.empty_cache()
print(json.dumps(found), flush=True)
while sys.stdin.readline():
    held = torch.empty(max(0, torch.cuda.mem_get_info()[0] - left), dtype=torch.uint8, device="cuda")
    print(json.dumps({"free": torch.cuda.mem_get_info()[0]}), flush=True)
"""


def model_path(base: Path) -> Path:
    return base / "models" / "diffusion_models" / FILE


# -- in ComfyUI's Python


def write_model(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    import torch

    from kit.comfyui import checkpoints

    with laps.lap("write"):
        if model_path(args.base).is_file():
            return
        dtype = torch.float8_e4m3fn if args.dtype == "fp8" else torch.bfloat16
        sizes = {"hidden": args.hidden, "depth": args.depth, "depth_single": args.single}
        path = checkpoints.flux(str(model_path(args.base)), dtype, **sizes, context=CONTEXT, pooled=POOLED)
        if args.lora:
            checkpoints.lora(str(args.base / "models" / "loras" / LORA), path, rank=args.lora, match="blocks")


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Load by the node and run ComfyUI's sampler once."""
    setup = CONTESTANTS[args.contestant]
    card_bytes = None if args.contestant == RESIDENT else int(args.free_gb * GB)
    options = {"dynamic_vram": setup.dynamic_vram, "card_bytes": card_bytes}
    comfyui.start_comfyui(args.comfyui, args.base, args.device, **options)
    import nodes
    import torch

    if setup.pack:
        from harness.pack import load_pack

        load_pack()
        from spillway.nodes.load import SpillwayLoadDiffusionModel

        def load() -> Any:
            return SpillwayLoadDiffusionModel.execute(FILE, "default").result[0]
    else:

        def load() -> Any:
            return nodes.UNETLoader().load_unet(FILE, "default")[0]

    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        with laps.lap("load"):
            model = load()
            if args.lora:
                model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA, 0.5)[0]
        latents = comfyui.sample_in_turns(laps, model, args, lambda: {"facts": facts_of(model)}, tokens=TOKENS)
        torch.save(latents, args.base / f"{slug(args.contestant)}.pt")


def facts_of(model: Any) -> dict[str, Any] | None:
    if not hasattr(model, "dynamic"):
        return None
    dynamic = model.dynamic
    return {"total": dynamic.total_bytes, "peak_resident": dynamic.peak_resident_bytes, **dynamic.ledger.as_dict()}


# -- in the parent


class Card:
    """Another program on the card."""

    def __init__(self, python: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.command, self.pipes = [python, "-c", HOLDER], pipes
        self.process: Any = None

    @contextlib.contextmanager
    def leaving(self, nbytes: int) -> Iterator[dict[str, Any]]:
        """Say what the card is, and leave so many bytes free meanwhile. 0: all."""
        process: Any = subprocess.Popen([*self.command, str(nbytes)], **self.pipes)
        try:
            found = json.loads(process.stdout.readline())
            if nbytes:
                process.stdin.write("\n")
                process.stdin.flush()
                found |= json.loads(process.stdout.readline())
            yield found
        finally:
            process.stdin.close()
            process.wait()


def has_card(python: str) -> bool:
    """Ask before a file of many GB is written for it."""
    return (
        subprocess.run([python, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]).returncode == 0
    )


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    card, free = Card(str(comfyui.find_comfyui()[1])), int(args.free_gb * GB)
    with card.leaving(0) as found:
        pass
    names = [name for name in CONTESTANTS if not args.only or any(word in name for word in args.only)]
    runs = {}
    for name in names:
        print(f"--- {name}", file=sys.stderr, flush=True)
        with card.leaving(free) if name != RESIDENT else contextlib.nullcontext():
            runs[name] = solo(name, command(name), 2 + args.rounds, args.threads)
    file_bytes = model_path(args.base).stat().st_size
    rows: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        if run.failed is not None:
            rows[name] = {"failed": run.failed}
            continue
        steps = run.seconds("step")
        last = run.last()
        rows[name] = {
            "load_s": run.seconds("load")[0],
            "first_step_s": run.seconds("first")[0],
            "second_step_s": steps[0],
            "steps_s": steps,
            "step_s": statistics.median(steps[len(steps) // 2 :]),
            "peak_device_bytes": max(lap.get("device_bytes") or 0 for lap in run.laps),
            "peak_rss_bytes": last["peak_rss"],
            "facts": last.get("facts"),
        }
    alone = rows.get(RESIDENT, {}).get("step_s")
    bus = max(0, file_bytes - free) / found["to_card"]
    limit = max(bus, alone or 0)
    reference = args.base / f"{slug(RESIDENT)}.pt"
    for name, row in rows.items():
        if "failed" not in row:
            row["to_limit"] = row["step_s"] / limit
            if reference.is_file():
                row["max_abs_difference"] = difference(args.base / f"{slug(name)}.pt", reference)
    about = (
        f"Flux, {file_bytes / GB:.1f} GB, {args.free_gb:g} GB free on {found['name']}, {args.size} x {args.size}, LoRA "
        f"rank {args.lora or 'none'}; bus {found['to_card'] / GB:.1f} GB/s, limit of a step {limit:.3f} s"
    )
    figures = {"file_bytes": file_bytes, "free_bytes": free, "card": found, "limit_s": limit, "bus_s": bus}
    return comfyui.Outcome((about, table(rows)), {**figures, "arguments": arguments_of(args), "results": rows})


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("dtype", "hidden", "depth", "single", "size", "lora", "rounds")}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ("", "load, s", "first step, s", "second", "later step, s", "/ limit", "most on the card, MB", "max diff")
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append((name, row["failed"], *[""] * 6))
            continue
        seconds = [report.number(row[key]) for key in ("load_s", "first_step_s", "second_step_s", "step_s", "to_limit")]
        most = report.megabytes(row["peak_device_bytes"])
        lines.append((name, *seconds, most, f"{row.get('max_abs_difference', float('nan')):g}"))
    return report.table(heads, lines)


def main() -> int:
    parser = comfyui.parser(__doc__)
    parser.add_argument("--device", default="cuda:0", help="the card, by torch's name (default %(default)s)")
    parser.add_argument("--free-gb", type=float, default=8, help="GB left on the card (default %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16", help="of the file")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="of a LoRA for all blocks; 0 is none")
    parser.add_argument("--depth", type=int, default=19, help="double blocks (default %(default)s)")
    parser.add_argument("--single", type=int, default=38, help="single blocks (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="steps after the first (default %(default)s)")
    parser.add_argument("--folder", help="holds the files, and keeps them for the next run with the same sizes")
    parser.add_argument("--only", action="append", help="contestants whose name has this in it; may be repeated")
    comfyui.add_flux(parser, 3072, "3072 is Flux.1's", size=1024)
    args = parser.parse_args()
    args.steps = 1 + args.rounds  # of one run of the sampler
    if not args.contestant and not has_card(str(comfyui.find_comfyui()[1])):
        print("there is no card that torch in ComfyUI's Python can use, and this measures one.", file=sys.stderr)
        return 2
    return comfyui.run(args, run_contestant, measure, write=write_model)


if __name__ == "__main__":
    sys.exit(main())
