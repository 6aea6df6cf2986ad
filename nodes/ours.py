"""Refuses models of other loaders, where a node needs one of ours."""

from __future__ import annotations

from typing import Any

from ..patcher.comfyui.loading.load import is_ours


def check_ours(node: str, patcher: Any, name: str = "MODEL") -> None:
    """Raise ValueError, with what to do, for a patcher that Spillway does not manage. node, name: for the words."""
    if not is_ours(patcher):
        raise ValueError(
            f"{node}: this {name} is not managed by Spillway. Load it with a Spillway loader, or put a Make Dynamic "
            "(Spillway) node before this one."
        )
