"""Where the tests in ComfyUI run with dynamic VRAM on the fake device: what is otherwise there."""

import pytest

from kit.comfyui.on_device import wants_aimdo

# The smallest piece of device memory that weights are given.
PIECE = 32 << 20 if wants_aimdo() else 1
software = pytest.mark.skipif(wants_aimdo(), reason="comfy-aimdo maps pages of 32 MiB, more than these models")
told = pytest.mark.skipif(wants_aimdo(), reason="comfy-aimdo sees allocations, and gives way without being told")


def in_pieces(nbytes):
    """Round up to whole pieces, which are what counts as resident."""
    return -(-nbytes // PIECE) * PIECE


def holds_some(policy):
    """Say whether a policy's budget has room for any weight. One that has none is kept as if it were 0."""
    return policy.vram_bytes >= PIECE
