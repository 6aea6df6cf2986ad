"""A picture of what was resident after each step: rows are bundles in execution order, as high as they are large."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Residency = Sequence[tuple[str, int, bool]]  # (bundle, bytes, resident), in execution order

WIDTH, HEIGHT, MARGIN = 1360, 820, 36
GRID_LEFT, GRID_RIGHT, GRID_TOP, GRID_BOTTOM = 150, 900, 130, 730
PANEL_LEFT, PANEL_RIGHT = 950, WIDTH - MARGIN
COLUMN_GAP = 10
LABEL_PITCH, WORD_PITCH = 50, 80  # pixels from one column's label to the next, and with 'Step' in it
PAPER, INK, FAINT = "#fafaf7", "#262c34", "#d0d2ce"
RESIDENT, STREAMED, UNTOUCHED = "#2062a6", "#f5b254", "#e2e2dc"  # apart for all kinds of colour vision, and in grey
TITLE, TEXT, SMALL = (ImageFont.load_default(size) for size in (28, 20, 16))


def group_of(name: str) -> str:
    """Name the part of the model that a bundle belongs to: 'Inputs', 'Double 3', 'Single 12' or 'Final'."""
    match = re.match(r"(double|single)_blocks\.(\d+)\.", name)
    if match:
        return f"{match[1].capitalize()} {match[2]}"
    return "Final" if name.startswith("final") else "Inputs"


def draw(path: Path, snapshots: Sequence[Residency], title: str, figures: Sequence[tuple[str, str]]) -> None:
    """Write the picture. The first of the snapshots is from before the first step, the others from after each step.

    The figures are labels and values for the panel beside the grid.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((MARGIN, MARGIN), title, INK, TITLE)
    # The last snapshot has the order that the steps ran in; the first can only guess at it.
    rows = [(name, nbytes) for name, nbytes, _ in snapshots[-1]]
    _draw_columns(canvas, rows, snapshots)
    _draw_blocks(canvas, rows)
    _draw_panel(canvas, figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _spans(rows: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, int]]:
    """Share the grid's height out by bytes: (name, top, bottom); top and bottom are equal where it gets no pixel."""
    pixels = (GRID_BOTTOM - GRID_TOP) / max(1, sum(nbytes for _, nbytes in rows))
    done = 0
    for name, nbytes in rows:
        yield name, GRID_TOP + round(done * pixels), GRID_TOP + round((done + nbytes) * pixels)
        done += nbytes


def _draw_columns(canvas: ImageDraw.ImageDraw, rows: Sequence[tuple[str, int]], snapshots: Sequence[Residency]) -> None:
    pitch = (GRID_RIGHT - GRID_LEFT) / len(snapshots)
    width = max(2, pitch - min(COLUMN_GAP, pitch / 4))
    labelled = math.ceil(LABEL_PITCH / pitch)  # every how many columns
    for column, snapshot in enumerate(snapshots):
        left = GRID_LEFT + column * pitch
        right, centre = left + width - 1, left + width / 2
        absent = STREAMED if column else UNTOUCHED  # nothing is read before the first step
        resident = {name for name, _, is_resident in snapshot if is_resident}
        for name, top, bottom in _spans(rows):
            if bottom > top:
                canvas.rectangle((left, top, right, bottom - 1), RESIDENT if name in resident else absent)
        if column % labelled:
            continue
        head = "Start" if column == 0 else f"Step {column}" if pitch > WORD_PITCH else f"{column}"
        total = sum(nbytes for _, nbytes, _ in snapshot)
        share = sum(nbytes for _, nbytes, is_resident in snapshot if is_resident) / max(1, total)
        canvas.text((centre, GRID_TOP - 12), head, INK, TEXT, anchor="ms")
        canvas.text((centre, GRID_BOTTOM + 26), f"{share:.0%}", INK, TEXT, anchor="ms")
    canvas.text((GRID_LEFT, GRID_BOTTOM + 54), "Share of the weights' bytes that is resident", INK, SMALL, anchor="ls")


def _draw_blocks(canvas: ImageDraw.ImageDraw, rows: Sequence[tuple[str, int]]) -> None:
    """Draw a hairline where a block begins and its name beside it, where there is room for one."""
    free_from = 0
    for group, spans in groupby(_spans(rows), key=lambda span: group_of(span[0])):
        members = list(spans)
        top, bottom = members[0][1], members[-1][2]
        if bottom == top:
            continue
        canvas.line((GRID_LEFT - 8, top, GRID_RIGHT, top), PAPER)
        canvas.line((GRID_LEFT - 16, top, GRID_LEFT - 8, top), INK)
        middle = (top + bottom) / 2
        if middle - SMALL.size / 2 >= free_from:
            canvas.text((GRID_LEFT - 22, middle), group, INK, SMALL, anchor="rm")
            free_from = middle + SMALL.size / 2 + 2


def _draw_panel(canvas: ImageDraw.ImageDraw, figures: Sequence[tuple[str, str]]) -> None:
    y = GRID_TOP
    for colour, text in ((RESIDENT, "Resident"), (STREAMED, "Streamed when used"), (UNTOUCHED, "Not read yet")):
        canvas.rectangle((PANEL_LEFT, y, PANEL_LEFT + 30, y + 20), colour)
        canvas.text((PANEL_LEFT + 44, y + 10), text, INK, TEXT, anchor="lm")
        y += 34
    canvas.text((PANEL_LEFT, y + 10), "A row's height is its bundle's bytes", INK, SMALL, anchor="lm")
    y += 36
    canvas.line((PANEL_LEFT, y, PANEL_RIGHT, y), FAINT)
    y += 24
    for label, value in figures:
        canvas.text((PANEL_LEFT, y), label, INK, TEXT, anchor="lm")
        canvas.text((PANEL_RIGHT, y), value, INK, TEXT, anchor="rm")
        y += 31
