"""What holds for all models of the running graph: a policy for those without one of their own, and a cap over all."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import comfy.model_management

from ...ops.never_raises import never_raises
from ...ops.vbar.cap import set_cap
from ..policy import Policy

NOTHING_SAID = Policy()

_policy: Policy | None = None
_caps: list[int] = []


def in_force(own: Policy) -> Policy:
    """Give a model's own policy where it says anything, or else that of the running graph."""
    return own if _policy is None or own != NOTHING_SAID else _policy


def begin(policy: Policy | None, caps: list[int]) -> None:
    """Begin a graph. Of several caps the smallest holds, on each device by itself."""
    global _policy
    _policy, _caps[:] = policy, caps
    _apply_caps()


def add(policy: Policy | None, cap: int | None) -> None:
    """Add what a node says while its graph runs."""
    global _policy
    _policy = policy or _policy
    if cap is not None:
        _caps.append(cap)
        _apply_caps()


def _apply_caps() -> None:
    every = getattr(comfy.model_management, "get_all_torch_devices", None)  # older versions know one
    for device in {comfy.model_management.get_torch_device(), *(every() if every is not None else ())}:
        set_cap(device, min(_caps, default=None))


def install(read: Callable[[dict[str, Any]], tuple[Policy | None, list[int]]]) -> None:
    """Begin each prompt with what `read` finds in it. A second call does nothing."""
    executor = getattr(sys.modules.get("execution"), "PromptExecutor", None)
    if executor is None or getattr(executor.execute, "spillway_graph_policy", False):
        return
    original: Callable[..., Any] = executor.execute

    @functools.wraps(original)
    def execute(self: Any, prompt: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        never_raises("reading the policies of a prompt")(lambda: begin(*read(prompt)))()
        return original(self, prompt, *args, **kwargs)

    execute.spillway_graph_policy = True  # type: ignore[attr-defined]
    executor.execute = execute
