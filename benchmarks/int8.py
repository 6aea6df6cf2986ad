"""INT8 beside bf16 and fp32: linear layers of real shapes, and a whole model's step.

    python dev.py bench int8                              # about two minutes and 1.2 GB of disk on two CPU cores
    python dev.py bench int8 --gb 0.2 --rounds 3          # a small model, to see that it runs
    python dev.py bench int8 --device cuda --json result.json

Everything runs in one process, in turns; each ratio is of two figures of the same round, and the median counts. The
model is the demo's Flux in bf16; beside the time of its steps stands how far its latents are from bf16's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from demo.checkpoint import ensure_checkpoint
from demo.flux import Flux, config_from_keys
from demo.sampling import make_inputs, sample
from harness import report
from harness.pack import load_pack
from harness.turns import seconds_in_turns

load_pack()
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.int8.linear import group_count
from spillway.ops.int8.weight import Int8Weight
from spillway.ops.skip_init import skip_model_initialization
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy
from spillway.patcher.quantised_layers import Int8Layers

# Columns and rows of weights: Flux, Wan 14B, SDXL.
SHAPES = ((3072, 3072), (3072, 12288), (12288, 3072), (5120, 5120), (1280, 5120), (1024, 4096))
TOKENS = (256, 1024)
DTYPES = (torch.bfloat16, torch.float32)
SHARES = {"bf16": None, "INT8": None, "INT8, 50 %": 0.5, "INT8, 0 %": 0.0}


def warm_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time each call in each round, after a round that does not count."""
    return {name: seconds[1:] for name, seconds in seconds_in_turns(calls, rounds + 1, device).items()}


def linear_layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure linear layers of normal numbers in floating point and in INT8: seconds, ratio and relative error."""
    found = []
    for columns, rows in SHAPES:
        for tokens in TOKENS:
            for dtype in DTYPES:
                x = torch.randn(tokens, columns, device=args.device, dtype=dtype)
                weight = torch.randn(rows, columns, device=args.device, dtype=dtype)
                groups = group_count(columns, args.device.type)
                quantised = Int8Weight(
                    torch.empty(weight.shape, dtype=torch.int8, device=args.device),
                    torch.empty(rows, groups, device=args.device),
                    dtype,
                )
                quantised.quantise_(weight)
                # Bound now: the loop goes on before nobody calls them any more.
                calls = {
                    "float": lambda x=x, weight=weight: F.linear(x, weight),
                    "int8": lambda x=x, quantised=quantised: F.linear(x, quantised),
                }
                seconds = warm_seconds(calls, args.rounds, args.device)
                wanted = F.linear(x.double(), weight.double())
                found.append(
                    {
                        "columns": columns,
                        "rows": rows,
                        "tokens": tokens,
                        "dtype": str(dtype).removeprefix("torch."),
                        "float_s": report.median(seconds["float"]),
                        "int8_s": report.median(seconds["int8"]),
                        "gain": report.ratio(seconds["float"], seconds["int8"]),
                        "error": float((calls["int8"]().double() - wanted).norm() / wanted.norm()),
                    }
                )
    return found


def whole_model(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure steps of the demo's model in bf16 and in INT8 at several residencies, in turns."""
    path = ensure_checkpoint(gb=args.gb)
    source = DiskMap(path)
    config = config_from_keys({key: source.spec(key) for key in source.keys()})  # noqa: SIM118 - no mapping
    models, quantise_s = {}, {}
    noise, ids, conditioning = make_inputs(config, args.size)
    for name, share in SHARES.items():
        with skip_model_initialization():
            module = Flux(config).to(torch.bfloat16)
        int8 = Int8Layers("Flux", args.device.type) if "INT8" in name else None
        model = DynamicModel(module, DiskMap(path), args.device, quantise=int8)
        total = model.total_bytes
        model.set_policy(Policy(vram_bytes=None if share is None else int(share * total), pinned_bytes=2 * total))
        models[name] = model

    def run(name: str, steps: int = 1) -> torch.Tensor:
        return sample(models[name], noise, ids, conditioning, device=args.device, steps=steps)

    for name in models:  # the first step reads, and quantises
        began = time.perf_counter()
        run(name)
        quantise_s[name] = time.perf_counter() - began
        run(name)
    seconds = warm_seconds({name: lambda name=name: run(name) for name in models}, args.rounds, args.device)
    latents = {name: run(name, 4).double().flatten() for name in models}
    rows = {}
    for name, model in models.items():
        rows[name] = {
            "bytes": model.total_bytes,
            "first_step_s": quantise_s[name],
            "step_s": report.median(seconds[name]),
            "gain": report.ratio(seconds["bf16"], seconds[name]),
            "cosine": float(torch.nn.functional.cosine_similarity(latents[name], latents["bf16"], dim=0)),
        }
    return rows


def layer_table(layers: list[dict[str, Any]]) -> str:
    columns = ("weight", "tokens", "dtype", "float, ms", "INT8, ms", "gain", "error")
    rows = [
        (
            f"{row['columns']} -> {row['rows']}",
            str(row["tokens"]),
            row["dtype"],
            report.number(1e3 * row["float_s"]),
            report.number(1e3 * row["int8_s"]),
            report.number(row["gain"]),
            f"{100 * row['error']:.2f} %",
        )
        for row in layers
    ]
    return report.table(columns, rows)


def model_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("", "MB", "first step, s", "step, s", "gain", "cosine to bf16")
    keys = ("first_step_s", "step_s", "gain")
    rows = [
        (name, report.megabytes(row["bytes"]), *[report.number(row[key]) for key in keys], f"{row['cosine']:.6f}")
        for name, row in models.items()
    ]
    return report.table(columns, rows)


def main() -> int:
    parser = report.parser(__doc__)
    report.add_threads(parser)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--gb", type=float, default=1.1, help="size of the model in bf16 (default %(default)s)")
    parser.add_argument("--size", type=int, default=384, help="pixels per side (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        layers = linear_layers(args)
        models = whole_model(args)
    about = f"Linear layers on {args.device}, {args.threads} threads"
    lines = (about, layer_table(layers), f"Flux in bf16, {args.size} x {args.size}", model_table(models))
    return report.publish(args.json, *lines, device=str(args.device), linear_layers=layers, whole_model=models)


if __name__ == "__main__":
    sys.exit(main())
