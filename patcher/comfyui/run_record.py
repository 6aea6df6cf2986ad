"""Records what each node of a run took: seconds, and the most memory."""

from __future__ import annotations

import functools
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...ops.never_raises import never_raises
from ...ops.ram.available import this_process
from ..dynamic_model import models

# A run of more nodes forgets its first ones.
MOST_NODES = 500


@dataclass(frozen=True)
class NodeRecord:
    """peaks: by device, the most bytes while the node ran. rss: bytes of the process when it had ended.

    used: what the listener says of the model that it used.
    """

    id: str
    kind: str
    seconds: float
    peaks: dict[str, int]
    rss: int
    used: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        told = {} if self.used is None else {"used": self.used}
        return {"id": self.id, "kind": self.kind, "seconds": self.seconds, "peaks": self.peaks, "rss": self.rss, **told}


@dataclass
class RunRecord:
    """One prompt. running: id, kind and time.monotonic() at its begin, of the node that runs now."""

    kinds: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    seconds: float | None = None  # None while it runs
    nodes: deque[NodeRecord] = field(default_factory=lambda: deque(maxlen=MOST_NODES))
    running: tuple[str, str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record, ready for JSON."""
        now = time.monotonic()
        running = self.running
        told = None if running is None else {"id": running[0], "kind": running[1], "seconds": now - running[2]}
        return {
            "seconds": now - self.began if self.seconds is None else self.seconds,
            "ended": self.seconds is not None,
            "running": told,
            "nodes": [node.as_dict() for node in list(self.nodes)],
        }


_current: RunRecord | None = None
# Is told of the end of each node: its peaks by device, and time.monotonic() at its begin. Says what its model did.
listener: Callable[[dict[str, int], float], dict[str, Any] | None] | None = None


def last_run() -> RunRecord | None:
    """Return the record of the running prompt, or else of the last one. None before the first."""
    return _current


def running_node() -> tuple[str, str] | None:
    """Return id and class of the node that runs now. None outside of one."""
    running = _current.running if _current is not None else None
    return None if running is None else running[:2]


def begin(prompt: dict[str, Any]) -> RunRecord:
    """Begin the record of a prompt."""
    global _current
    kinds = {str(node): str(inputs.get("class_type", "")) for node, inputs in prompt.items()}
    _current = RunRecord(kinds)
    return _current


def install() -> bool:
    """Record each prompt from now on. Returns False where this ComfyUI's executor is not known. Twice is once."""
    execution: Any = sys.modules.get("execution")
    executor, get_output = getattr(execution, "PromptExecutor", None), getattr(execution, "get_output_data", None)
    if executor is None or get_output is None:
        return False
    if getattr(get_output, "spillway_run_record", False):
        return True
    execute: Callable[..., Any] = executor.execute

    @functools.wraps(execute)
    def recorded(self: Any, prompt: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        record = never_raises("recording a run")(begin)(prompt)
        try:
            return execute(self, prompt, *arguments, **named)
        finally:
            if record is not None:
                record.seconds, record.running = time.monotonic() - record.began, None

    @functools.wraps(get_output)
    async def timed(prompt_id: Any, unique_id: Any, obj: Any, *arguments: Any, **named: Any) -> Any:
        end = never_raises("recording a node")(_begin_node)(unique_id, obj)
        whole = False
        try:
            made = await get_output(prompt_id, unique_id, obj, *arguments, **named)
            whole = True
            return made
        finally:
            if end is not None:
                never_raises("recording a node")(end)(whole)

    timed.spillway_run_record = True  # type: ignore[attr-defined]
    execution.get_output_data = timed
    executor.execute = recorded
    return True


def _begin_node(unique_id: Any, obj: Any) -> Callable[[bool], None] | None:
    """Begin a node. Returns what is to be called at its end, with whether it came to a result."""
    record, node = _current, str(unique_id)
    if record is None:
        return None
    own = obj if isinstance(obj, type) else type(obj)
    kind = record.kinds.get(node) or own.__name__
    began = time.monotonic()
    record.running = (node, kind, began)
    for module, index in _devices():
        module.reset_peak_memory_stats(index)

    def end(whole: bool) -> None:
        seconds = time.monotonic() - began
        record.running = None
        peaks, rss = _peaks(), this_process().memory_info().rss
        # One that failed or was interrupted has not shown what it takes, and the next plan would leave too little free.
        used = listener(peaks, began) if whole and listener is not None else None
        record.nodes.append(NodeRecord(node, kind, seconds, peaks, rss, used))

    return end


def _devices() -> list[tuple[Any, int]]:
    """List the devices that torch has begun to use, as (module, index)."""
    found = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available() and module.is_initialized():
            found += [(module, index) for index in range(module.device_count())]
    return found


def _peaks() -> dict[str, int]:
    """Return the most bytes by device since the node began. What comfy-aimdo has mapped lies beside torch's."""
    peaks = {}
    for module, index in _devices():
        name = f"{module.__name__.rpartition('.')[2]}:{index}"
        beside = sum(m.resident_bytes for m in list(models) if str(m.device) == name and m.vbar_kind == "aimdo")
        peak = module.max_memory_allocated(index) + beside
        if peak:
            peaks[name] = peak
    return peaks
