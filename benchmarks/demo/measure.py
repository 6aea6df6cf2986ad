"""One measured run in a process of its own, so that nothing else counts in its peak memory. ``run.py`` starts it.

Leaves two files in the hand-over folder: NAME.json with the figures and NAME.pt with the latents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo.flux import Flux, config_from_keys
from demo.progress import Bar
from demo.sampling import make_inputs, sample
from harness.memory import Peak, anonymous_bytes, peak_rss
from harness.pack import load_pack
from harness.turns import synchronise

COUNTERS = ("bytes_streamed", "faults", "evictions", "misses", "stalls")


def measure(args: argparse.Namespace) -> tuple[dict, torch.Tensor]:
    """Load the checkpoint under the budget and denoise; return the figures and the final latents."""
    load_pack()
    from spillway.ops.files.disk_map import DiskMap
    from spillway.ops.skip_init import skip_model_initialization
    from spillway.patcher.dynamic_model import DynamicModel
    from spillway.patcher.policy import Policy

    device = torch.device(args.device)
    started = time.perf_counter()
    source = DiskMap(args.checkpoint)
    specs = {key: source.spec(key) for key in source.keys()}  # noqa: SIM118 - a source is no mapping
    weights = sum(spec.nbytes for spec in specs.values())
    budget = None if args.budget is None else int(weights * args.budget)
    config = config_from_keys(specs)
    with skip_model_initialization():
        module = Flux(config).to(torch.bfloat16)
    model = DynamicModel(module, source, device=args.device, policy=Policy(vram_bytes=budget))
    synchronise(device)
    load_s = time.perf_counter() - started

    noise, ids, conditioning = make_inputs(config, args.size, args.seed)
    snapshots, marks = [model.bundle_report()], [time.perf_counter()]
    counters = [_counters(model)]
    with Peak(anonymous_bytes) as anonymous, Bar(f"denoising, {args.name}", args.steps, " steps") as bar:

        def after_step(step: int, _: torch.Tensor) -> None:
            synchronise(device)
            marks.append(time.perf_counter())
            snapshots.append(model.bundle_report())
            counters.append(_counters(model))
            bar.update(step, f"{marks[-1] - marks[-2]:.2f} s/step")

        latents = sample(model, noise, ids, conditioning, device=device, steps=args.steps, callback=after_step)
    times = [after - before for before, after in pairwise(marks)]
    figures = {
        "device": str(device),
        "vbar": model.vbar_kind,
        "weights_bytes": weights,
        "budget_bytes": budget,
        "total_bytes": model.total_bytes,
        "resident_bytes": model.resident_bytes,
        "peak_resident_bytes": model.peak_resident_bytes,
        "peak_rss_bytes": peak_rss(),
        "peak_anonymous_bytes": anonymous.peak,
        "load_s": load_s,
        "first_step_s": times[0],
        # The median: a step that the system interrupted says nothing about the others.
        "step_s": statistics.median(times[1:] or times),
        "steps_s": times,
        **counters[-1],
        "counters_by_step": counters,
        "decisions": list(model.ledger.decisions),
        "residency": [[[name, nbytes, bool(resident)] for name, nbytes, resident in snap] for snap in snapshots],
        "latents_finite": bool(latents.isfinite().all()),
        "latents_std": float(latents.std()),
    }
    model.close()
    return figures, latents


def _counters(model: object) -> dict[str, int]:
    counters = model.ledger.counters
    return {name: int(getattr(counters, name, 0)) for name in COUNTERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--budget", type=float, help="share of the weights' bytes; left out: no limit")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    figures, latents = measure(args)
    torch.save(latents, args.folder / f"{args.name}.pt")
    (args.folder / f"{args.name}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
