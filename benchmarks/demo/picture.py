"""A picture of which bundles were resident after each step: rows are bundles in execution order, columns are steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .font import HEIGHT as FONT_HEIGHT
from .font import draw_text, text_width
from .png import write_png

Residency = Sequence[tuple[str, int, bool]]  # (bundle, bytes, resident), in execution order

WIDTH, MIN_HEIGHT = 1000, 600
GRID_LEFT, GRID_RIGHT, GRID_TOP = 150, 650, 92
PANEL_LEFT = 680
PAPER, INK, FAINT = (250, 250, 247), (38, 44, 52), (214, 216, 212)
RESIDENT, STREAMED = (32, 98, 166), (245, 178, 84)  # apart for every kind of colour vision, and in grey
UNTOUCHED = (226, 226, 220)
# Smaller bundles stay resident under any budget: hundreds of rows that would all look the same.
SMALL = 16 << 10


def group_of(name: str) -> str:
    """The part of the model that a bundle belongs to: 'inputs', 'double 3', 'single 12' or 'final'."""
    match = re.match(r"(double|single)_blocks\.(\d+)\.", name)
    if match:
        return f"{match[1]} {match[2]}"
    return "final" if name.startswith("final") else "inputs"


def draw(path: Path, snapshots: Sequence[Residency], title: str, figures: Sequence[str]) -> None:
    """Write the picture: ``snapshots`` is the residency before the first step, then after each step, ``figures`` the
    lines of text beside the grid (about 25 letters each)."""
    # The last snapshot has the order that the steps ran in; the first, taken before any ran, can only guess at it.
    rows = [name for name, nbytes, _ in snapshots[-1] if nbytes >= SMALL]
    row_height = max(2, (MIN_HEIGHT - GRID_TOP - 60) // max(1, len(rows)))
    bottom = GRID_TOP + row_height * len(rows)
    canvas = np.full((max(MIN_HEIGHT, bottom + 60), WIDTH, 3), PAPER, dtype=np.uint8)
    draw_text(canvas, 20, 20, title, INK, 2)
    _draw_rows(canvas, rows, row_height)
    _draw_columns(canvas, snapshots, rows, row_height, bottom)
    _draw_panel(canvas, figures, len(snapshots[-1]) - len(rows))
    write_png(path, canvas)


def _draw_rows(canvas: np.ndarray, rows: Sequence[str], row_height: int) -> None:
    """Label the blocks down the left side, each with a line where it begins; crowded labels are left out."""
    last_group, free_from = "", 0
    for position, name in enumerate(rows):
        group, y = group_of(name), GRID_TOP + position * row_height
        if group == last_group:
            continue
        last_group = group
        canvas[y, GRID_LEFT - 10 : GRID_LEFT] = INK
        if y >= free_from:
            draw_text(canvas, GRID_LEFT - 16 - text_width(group, 2), y, group, INK, 2)
            free_from = y + 2 * FONT_HEIGHT + 3


def _draw_columns(
    canvas: np.ndarray, snapshots: Sequence[Residency], rows: Sequence[str], row_height: int, bottom: int
) -> None:
    pitch = (GRID_RIGHT - GRID_LEFT) // len(snapshots)
    width = max(4, pitch - 8)
    for column, snapshot in enumerate(snapshots):
        x = GRID_LEFT + 6 + column * pitch
        absent = STREAMED if column else UNTOUCHED  # before the first step nothing has been read at all
        resident = {name for name, _, is_resident in snapshot if is_resident}
        last_group = ""
        for position, name in enumerate(rows):
            y = GRID_TOP + position * row_height
            canvas[y : y + row_height, x : x + width] = RESIDENT if name in resident else absent
            if group_of(name) != last_group:
                canvas[y, x : x + width] = PAPER  # a hairline between blocks
                last_group = group_of(name)
        total = sum(nbytes for _, nbytes, _ in snapshot)
        share = sum(nbytes for _, nbytes, is_resident in snapshot if is_resident) / max(1, total)
        head = "load" if column == 0 else f"step {column}" if pitch > 80 else f"{column}"
        for y, text in ((GRID_TOP - 24, head), (bottom + 10, f"{share:.0%}")):
            draw_text(canvas, x + (width - text_width(text, 2)) // 2, y, text, INK, 2)
    draw_text(canvas, GRID_LEFT + 6, bottom + 36, "share of the weight bytes that is resident", INK, 1)


def _draw_panel(canvas: np.ndarray, figures: Sequence[str], hidden: int) -> None:
    y = GRID_TOP
    for colour, text in ((RESIDENT, "resident"), (STREAMED, "streamed when used"), (UNTOUCHED, "not read yet")):
        canvas[y : y + 16, PANEL_LEFT : PANEL_LEFT + 26] = colour
        draw_text(canvas, PANEL_LEFT + 36, y + 1, text, INK, 2)
        y += 26
    if hidden:
        draw_text(canvas, PANEL_LEFT, y + 2, f"{hidden} bundles under 16 KiB not drawn", INK, 1)
    y += 22
    canvas[y, PANEL_LEFT : WIDTH - 20] = FAINT
    y += 16
    for line in figures:
        draw_text(canvas, PANEL_LEFT, y, line, INK, 2)
        y += 23
