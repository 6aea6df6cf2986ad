"""Models that are quantised."""

import functools

import pytest

from kit.comfyui.loras import forms

# Wide enough for all formats: W4A8 rotates 256 columns.
WIDE = {"hidden": 256, "depth": 1, "depth_single": 1}


@pytest.fixture
def flux(checkpoint):
    """A Flux of 8 MB."""
    return checkpoint("flux", **WIDE)


@pytest.fixture
def wide_forms():
    """``forms`` for its matrices."""
    return functools.partial(forms, hidden=WIDE["hidden"])


@pytest.fixture
def w4a8():
    """The name of the smallest format, in which files of this size are quantised."""
    from comfy.quant_ops import QUANT_ALGOS

    if "asym_w4a8_int8" not in QUANT_ALGOS:
        pytest.skip("this ComfyUI has no asym_w4a8_int8")
    return "w4a8"
