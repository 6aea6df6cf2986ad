"""The demo's checkpoint: a Flux.1-shaped model of about a gigabyte, random but sane, made once and kept.

Run it alone to make a file elsewhere or of another size:

    python benchmarks/demo/checkpoint.py --gb 12 --path big.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo import random_weights
from demo.flux import Flux, FluxConfig
from demo.random_weights import Fill

CACHE = Path(__file__).resolve().parent / "cache"
DEFAULT_GB, MIN_GB, MAX_GB = 1.1, 0.1, 64.0
# Width grows with the file, as in real models; below the first limit depth alone does the work, so that the demo has
# many bundles to show. Limits in GB, widths multiples of the head size 128.
WIDTHS = ((2.5, 1024), (5.0, 1536), (9.0, 2048), (float("inf"), 3072))


def fills_of(config: FluxConfig) -> dict[str, Fill]:
    """List every tensor of a Flux checkpoint of these sizes, in the order of the modules."""
    with torch.device("meta"):
        state = Flux(config).state_dict()
    return {key: _fill(key, tuple(tensor.shape)) for key, tensor in state.items()}


def _fill(key: str, shape: tuple[int, ...]) -> Fill:
    if key.endswith(".scale"):
        return Fill(shape, 0.05, mean=1.0)
    if key.endswith(".bias"):
        return Fill(shape, 0.02)
    # Weights that keep a signal's size, with modulation kept small: activations then stay of order one through any
    # depth, and a difference between two runs is one that bf16 can show.
    gain = 0.3 if "mod" in key.lower() else 1.0
    return Fill(shape, gain / shape[1] ** 0.5)


def nbytes_of(config: FluxConfig) -> int:
    """Count the bytes of the checkpoint's tensors in bf16."""
    return sum(fill.nbytes for fill in fills_of(config).values())


def config_for(gb: float) -> FluxConfig:
    """Return the smallest model of at least ``gb`` gigabytes (1e9 bytes), about two single blocks to a double one."""
    if not MIN_GB <= gb <= MAX_GB:
        raise ValueError(f"a model of {gb:g} GB was asked for; expected {MIN_GB:g} to {MAX_GB:g}")
    width = next(width for limit, width in WIDTHS if gb < limit)
    base = FluxConfig(hidden_size=width, depth=1, depth_single=0)
    fixed, one = nbytes_of(replace(base, depth=0)), nbytes_of(base)
    single = nbytes_of(replace(base, depth_single=1)) - one
    double, want = one - fixed, gb * 1e9 - fixed
    depth = max(1, round(want / (double + 2 * single)))
    depth_single = max(1, -int(-(want - depth * double) // single))
    return replace(base, depth=depth, depth_single=depth_single)


def ensure_checkpoint(path: Path | None = None, gb: float = DEFAULT_GB, seed: int = 0) -> Path:
    """Return the path of the checkpoint, writing it first unless a complete one of this size and seed is there.

    ``path`` defaults to a file in the demo's cache folder. A file that is already at ``path`` is used as it is, never
    overwritten, so that a real Flux.1 checkpoint can be passed too.
    """
    if path is not None and path.is_file():
        return path
    config = config_for(gb)
    path = path or CACHE / f"flux-{config.hidden_size}x{config.depth}x{config.depth_single}-seed{seed}.safetensors"
    return random_weights.ensure(path, fills_of(config), {"flux_config": json.dumps(asdict(config))}, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=DEFAULT_GB, help="size in gigabytes (default %(default)s)")
    parser.add_argument("--path", type=Path, help="where to write it (default: the demo's cache folder)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = ensure_checkpoint(args.path, args.gb, args.seed)
    parameters = sum(prod(fill.shape) for fill in fills_of(config_for(args.gb)).values())
    print(f"{path}  {path.stat().st_size / 1e9:.2f} GB, {parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
