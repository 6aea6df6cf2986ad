"""A picture of which layers are on their device."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw

from ..ops.ledger import in_words

WIDTH, ROW, BAR, MARGIN = 1024, 52, 24, 12
BACKGROUND, TEXT = (24, 26, 32), (220, 222, 228)
RESIDENT, AWAY = (86, 196, 140), (66, 72, 88)


def residency_picture(models: list[dict[str, Any]]) -> torch.Tensor:
    """[1, height, 1024, 3], from 0 to 1: a bar for each model, its layers as wide as they are large."""
    rows = [model for model in models if model["residency"]]
    image = Image.new("RGB", (WIDTH, MARGIN * 2 + ROW * max(1, len(rows))), BACKGROUND)
    draw = ImageDraw.Draw(image)
    if not rows:
        draw.text((MARGIN, MARGIN), "no Spillway model is loaded", fill=TEXT)
    for number, model in enumerate(rows):
        top = MARGIN + number * ROW
        resident = sum(size for _, size, here in model["residency"] if here)
        total = sum(size for _, size, _ in model["residency"]) or 1
        words = f"{model['name']} on {model['device']}: {in_words(resident)} of {in_words(total)} resident"
        draw.text((MARGIN, top), words, fill=TEXT)
        _bar(draw, top + 18, model["residency"], total)
    array = numpy.asarray(image, dtype=numpy.float32) / 255
    return torch.from_numpy(array.copy())[None]


def _bar(draw: Any, top: int, layers: list[Any], total: int) -> None:
    before, width = 0, WIDTH - 2 * MARGIN
    for _, size, resident in layers:
        left, right = before * width // total, (before + size) * width // total
        before += size
        box = (MARGIN + left, top, MARGIN + max(left, right - 2), top + BAR)
        draw.rectangle(box, fill=RESIDENT if resident else AWAY)
