"""A bitmap font of 5 x 7 dots, so that the demo can label its picture without an imaging library."""

from __future__ import annotations

import numpy as np

WIDTH, HEIGHT = 5, 7

# Seven rows a letter, one number each: its five low bits are the dots from left to right.
_ROWS = {
    " ": (0, 0, 0, 0, 0, 0, 0),
    "A": (14, 17, 17, 31, 17, 17, 17),
    "B": (30, 17, 17, 30, 17, 17, 30),
    "C": (14, 17, 16, 16, 16, 17, 14),
    "D": (30, 17, 17, 17, 17, 17, 30),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "F": (31, 16, 16, 30, 16, 16, 16),
    "G": (14, 17, 16, 23, 17, 17, 14),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "I": (14, 4, 4, 4, 4, 4, 14),
    "J": (7, 2, 2, 2, 2, 18, 12),
    "K": (17, 18, 20, 24, 20, 18, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "M": (17, 27, 21, 21, 17, 17, 17),
    "N": (17, 25, 21, 19, 17, 17, 17),
    "O": (14, 17, 17, 17, 17, 17, 14),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "Q": (14, 17, 17, 17, 21, 18, 13),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "U": (17, 17, 17, 17, 17, 17, 14),
    "V": (17, 17, 17, 17, 17, 10, 4),
    "W": (17, 17, 17, 21, 21, 27, 17),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "Y": (17, 17, 10, 4, 4, 4, 4),
    "Z": (31, 1, 2, 4, 8, 16, 31),
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 6, 8, 16, 31),
    "3": (14, 17, 1, 6, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
    ".": (0, 0, 0, 0, 0, 12, 12),
    ",": (0, 0, 0, 0, 12, 4, 8),
    ":": (0, 12, 12, 0, 12, 12, 0),
    "-": (0, 0, 0, 31, 0, 0, 0),
    "+": (0, 4, 4, 31, 4, 4, 0),
    "=": (0, 0, 31, 0, 31, 0, 0),
    "/": (1, 1, 2, 4, 8, 16, 16),
    "%": (24, 25, 2, 4, 8, 19, 3),
    "(": (2, 4, 8, 8, 8, 4, 2),
    ")": (8, 4, 2, 2, 2, 4, 8),
    "_": (0, 0, 0, 0, 0, 0, 31),
    "?": (14, 17, 1, 6, 4, 0, 4),
}


def text_width(text: str, scale: int = 1) -> int:
    """Pixels that ``text`` takes, without the gap behind its last letter."""
    return max(0, len(text) * (WIDTH + 1) - 1) * scale


def draw_text(canvas: np.ndarray, x: int, y: int, text: str, colour: tuple[int, int, int], scale: int = 1) -> None:
    """Draw ``text`` with its top left at (x, y) on an (H, W, 3) uint8 canvas. Letters become capitals; what the font
    lacks becomes a question mark; what leaves the canvas is cut off."""
    for letter in text.upper():
        rows = np.array(_ROWS.get(letter, _ROWS["?"]), dtype=np.uint8)
        dots = (rows[:, None] >> np.arange(WIDTH - 1, -1, -1)) & 1
        mask = np.kron(dots, np.ones((scale, scale), dtype=np.uint8)).astype(bool)
        area = canvas[y : y + mask.shape[0], x : x + mask.shape[1]]
        area[mask[: area.shape[0], : area.shape[1]]] = colour
        x += (WIDTH + 1) * scale
