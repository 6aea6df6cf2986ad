"""The formats that loaders and save nodes offer, of those that this ComfyUI has."""

from __future__ import annotations

from .layouts import Format

# The most exact first. How exact they are was measured by `dev.py bench formats`.
FORMATS = {
    known.name: known
    for known in (
        Format("int8_convrot", "int8_tensorwise", 8, rotated=True),
        Format("mxfp8", "mxfp8", 8),
        Format("fp8_e4m3fn scaled", "float8_e4m3fn", 8),
        Format("w4a8", "asym_w4a8_int8", 4, rotated=True),
        Format("nvfp4", "nvfp4", 4),
    )
    if known.known
}
# For files alone. Models that are loaded as INT8 without rotation are multiplied by products of our own.
PLAIN_INT8 = Format("int8_tensorwise", "int8_tensorwise", 8)
SAVED_FORMATS = {**FORMATS, **({PLAIN_INT8.name: PLAIN_INT8} if PLAIN_INT8.known else {})}
