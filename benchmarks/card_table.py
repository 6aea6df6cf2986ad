"""Prints what fits on a card by arithmetic: resident and streamed GB, and seconds of the bus in each step.

Nothing is measured. Shapes are those of tests/kit/virtual/models. Speeds are those of tests/kit/virtual/devices.py,
four fifths of what a bus has by its name. The table stands in the README and in docs/small-cards.md. A test looks.

    python dev.py bench card_table [--bits 16|8]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from kit.virtual.devices import GB, MACHINES
from kit.virtual.layers import Model
from kit.virtual.models import MODELS

CARDS = (6, 8, 12, 16, 24)  # GB
TAKEN = 2.5  # GB of each card for the computation and other programs
SLOW, FAST = (MACHINES[name].bus / GB for name in ("3070 8GB gen3x8", "4090 24GB gen4x16"))
SHOWN = {
    "Z-Image": "Z-Image 1024",
    "Flux": "Flux 1024",
    "Wan 14B": "Wan 14B 480p, 81 frames",
    "LTX-2": "LTX-2 512p, 121 frames",
    "Qwen-Image": "Qwen-Image 1328",
}


def size(model: Model, bits: int) -> float:
    """Return the GB of a model whose weights with two dimensions take `bits` bits. All others keep 16."""
    numbers = {True: 0, False: 0}
    for parameter in model.parameters():
        numbers[parameter.dim() == 2] += parameter.numel()
    return (numbers[True] * bits + numbers[False] * 16) / 8 / GB


def cell(total: float, card: float) -> str:
    """Say what stays on the card, what each step brings, and how long that takes on either bus."""
    streamed = max(0.0, total - (card - TAKEN))
    if not streamed:
        return "all stays"
    return f"{total - streamed:.1f} + {streamed:.1f}: {streamed / SLOW:.1f} / {streamed / FAST:.1f} s"


def table(bits: int = 16) -> str:
    """Return the table in Markdown. Columns are as wide as what they hold."""
    rows = [["Model", "GB", *(f"{card} GB" for card in CARDS)]]
    for name, key in SHOWN.items():
        with torch.device("meta"):
            total = size(MODELS[key](), bits)
        rows.append([name, f"{total:.1f}", *(cell(total, card) for card in CARDS)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(16, 8), default=16)
    print(table(parser.parse_args().bits))


if __name__ == "__main__":
    main()
