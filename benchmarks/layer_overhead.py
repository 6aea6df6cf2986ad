"""What a hook costs: Python time per layer that is resident, over the plain module, beside accelerate and diffusers.

    python dev.py bench layer_overhead                      # many tiny layers, so that little else is measured
    python dev.py bench layer_overhead --profile            # and what our own time is spent on
    python dev.py bench layer_overhead --layers 400 --rounds 200 --json result.json

All contestants run in one process on one thread, in turns; the least of many rounds counts.
"""

from __future__ import annotations

import copy
import cProfile
import pstats
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from harness import report
from harness.pack import ROOT, load_pack
from harness.turns import seconds_in_turns

load_pack()
from spillway.ops.device.backend import Backend
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

PLAIN, CAST = "plain module", "Spillway, cast"
KEYS = ("layer_us", "overhead_us", "overhead_median_us")
Model = Callable[[torch.Tensor], torch.Tensor]


class Tiny(torch.nn.Module):
    """Layers so small that calling them costs more than computing them."""

    def __init__(self, kind: str, layers: int, width: int) -> None:
        super().__init__()
        make = {"Linear": lambda: torch.nn.Linear(width, width), "LayerNorm": lambda: torch.nn.LayerNorm(width)}[kind]
        self.layers = torch.nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def contestants(plain: Tiny) -> dict[str, Model]:
    """Copy one module for each contestant and add its hooks; what is not installed is left out."""
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    found: dict[str, Model] = {PLAIN: plain, "Spillway, in place": dynamic(plain, weights)}
    # A final form of its own, as a cast or patched weight has: the layer is lent a view, not the file's tensor.
    found[CAST] = dynamic(copy.deepcopy(plain).bfloat16(), weights, dtype=torch.float32)
    found["Spillway, device caster"] = dynamic(plain, weights, backend=TwoStreams(torch.device("cpu")))
    try:
        import accelerate
        from accelerate.hooks import attach_align_device_hook

        resident = copy.deepcopy(plain)
        attach_align_device_hook(resident, execution_device=torch.device("cpu"), offload=False)
        found["accelerate, resident"] = resident
        found["accelerate, cpu_offload"] = accelerate.cpu_offload(copy.deepcopy(plain), torch.device("cpu"))
    except ImportError:
        pass
    try:
        from diffusers.hooks import apply_group_offloading

        grouped = copy.deepcopy(plain)
        apply_group_offloading(grouped, torch.device("cpu"), torch.device("cpu"), "leaf_level")
        found["diffusers, leaf groups"] = grouped
    except ImportError:
        pass
    return found


class TwoStreams(Backend):
    """Takes the way of a GPU, on the CPU: its caster, its look-ahead, without what a driver's calls would cost."""

    streams = 2


def dynamic(
    plain: Tiny, weights: int, *, dtype: torch.dtype | None = None, backend: Backend | None = None
) -> DynamicModel:
    """Make ours, with room for everything."""
    policy = Policy(vram_bytes=16 * weights + (1 << 20))
    wanted = None if dtype is None else lambda *_: dtype
    return DynamicModel(copy.deepcopy(plain), None, "cpu", policy, model_dtype=wanted, backend=backend)


def measure(models: Mapping[str, Model], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every forward, after some that do not count."""
    want = models[PLAIN](x)
    for name, model in models.items():
        for _ in range(3):
            out = model(x)
        if name != CAST and not torch.equal(out, want):
            raise SystemExit(f"{name} computes something else than the plain module")
    return seconds_in_turns({name: partial(model, x) for name, model in models.items()}, rounds)


def figures(seconds: Mapping[str, list[float]], layers: int) -> dict[str, dict[str, float]]:
    """Return each contestant's microseconds for a whole layer, and what it takes over the plain module's."""
    plain = seconds[PLAIN]
    found = {}
    for name, times in seconds.items():
        over = [one - other for one, other in zip(times, plain, strict=True)]
        found[name] = {
            "layer_us": min(times) / layers * 1e6,
            "overhead_us": (min(times) - min(plain)) / layers * 1e6,
            "overhead_median_us": statistics.median(over) / layers * 1e6,
        }
    return found


def profile(model: Model, x: torch.Tensor, rounds: int) -> str:
    """List the functions that our time goes to. The profiler makes calls look dearer than they are."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(rounds):
        model(x)
    profiler.disable()
    entries = []
    for (file, line, function), (_, calls, own, total, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        if str(ROOT) in file or "RLock" in function:
            place = f"{Path(file).relative_to(ROOT)}:{line}" if str(ROOT) in file else file
            times = f"{own / calls * 1e6:6.2f} us own  {total / calls * 1e6:6.2f} us in all"
            entries.append((own, f"  {times}  {place} {function}"))
    return "\n".join(text for _, text in sorted(entries, reverse=True)[:14])


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--profile", action="store_true", help="also show where our own time goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(4, args.width)
    results, profiles = {}, []
    with torch.inference_mode():
        for kind in ("Linear", "LayerNorm"):
            models = contestants(Tiny(kind, args.layers, args.width))
            results[kind] = figures(measure(models, x, args.rounds), args.layers)
            if args.profile:
                ours = {name: model for name, model in models.items() if name.startswith("Spillway")}
                profiles += [f"{kind}, {name}:\n{profile(model, x, 50)}" for name, model in ours.items()]
    about = f"{args.layers} layers of width {args.width}, {args.rounds} rounds, one thread; microseconds per layer"
    rows = []
    for name in next(iter(results.values())):
        rows.append((name, *[f"{by_name[name][key]:.2f}" for by_name in results.values() for key in KEYS]))
    columns = ("", *[f"{kind}{what}" for kind in results for what in ("", ", over plain", ", median")])
    options = {"layers": args.layers, "width": args.width, "rounds": args.rounds}
    return report.publish(args.json, about, report.table(columns, rows), *profiles, **options, results=results)


if __name__ == "__main__":
    sys.exit(main())
