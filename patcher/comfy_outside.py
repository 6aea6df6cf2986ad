"""Whether a node of ComfyUI's is running: what is called in both cases may raise in one of them alone."""

from __future__ import annotations

from comfy_execution.utils import get_executing_context


def in_a_node() -> bool:
    """Whether this code runs in a node's execution, whose errors its author must see."""
    return get_executing_context() is not None
