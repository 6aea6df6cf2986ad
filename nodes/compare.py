"""Runs a graph once through ComfyUI's loaders and once through Spillway's, and says what each run took."""

from __future__ import annotations

import copy
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import nodes as comfyui_nodes
import psutil

from ..cache.comfyui import tiers
from ..ops.never_raises import never_raises
from ..ops.ram.garbage import collect_garbage
from ..patcher.comfyui import run_record
from . import manage
from .checked_node import CheckedNode
from .compare_files import Shown, compared, shown_files
from .compare_text import display_name, text_of

ASKS = "spillway_compare"  # in a prompt's extra_data: the comparison's id
KINDS = ("ComfyUI", "Spillway")
EVERY_SECONDS = 0.05


@dataclass
class Run:
    """What one run took. state: 'waits', 'runs', 'done', or in words why it ended. nodes: class and seconds of each."""

    prompt_id: str
    state: str = "waits"
    seconds: float = 0.0
    rss: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    files: list[Shown] = field(default_factory=list)
    nodes: dict[str, tuple[str, float]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"state": self.state, "seconds": self.seconds, "rss": self.rss, "peaks": self.peaks}


class Comparison:
    """Two runs of one graph. `around` measures them where the server's worker runs them."""

    def __init__(self, queue: Any, same: list[str]) -> None:
        """queue: the server's. same: names of nodes that are Spillway's in both runs."""
        self.queue, self.id = queue, str(uuid.uuid4())
        self.runs = {kind: Run(str(uuid.uuid4())) for kind in KINDS}
        self.same = same
        self.kept: list[str] = []  # models that a pack kept from the first run to the second
        self.shown: dict[str, Any] | None = None

    @property
    def state(self) -> str:
        """Say 'runs', 'done', or why it ended."""
        states = [run.state for run in self.runs.values()]
        ended = [state for state in states if state not in ("waits", "runs", "done")]
        return ended[0] if ended else "done" if states == ["done", "done"] else "runs"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        runs = {kind: run.as_dict() for kind, run in self.runs.items()}
        told = {"id": self.id, "state": self.state, "runs": runs, "shown": self.shown}
        told |= {"same": self.same, "kept": self.kept}
        return {**told, "text": None if self.state == "runs" else text_of(self)}


_current: Comparison | None = None


def current() -> Comparison | None:
    """Return the comparison under way, or else the last one."""
    return _current


def prompts(comparison: Comparison, given: dict[str, dict[str, Any]], client: str | None) -> list[tuple]:
    """Make what is queued: (prompt id, prompt, extra_data) of each run."""
    made = []
    for kind, run in comparison.runs.items():
        extra = {ASKS: comparison.id, manage.ASKS: kind == KINDS[1]}
        made.append((run.prompt_id, without_files(given[kind]), {**extra, **({"client_id": client} if client else {})}))
    return made


def without_files(prompt: dict[str, Any]) -> dict[str, Any]:
    """Copy a prompt whose pictures are shown, and not saved among the user's."""
    copied = copy.deepcopy(prompt)
    for node in copied.values():
        if node["class_type"] == "SaveImage":
            node["class_type"] = "PreviewImage"
            node["inputs"] = {name: value for name, value in node["inputs"].items() if name == "images"}
    return copied


def ours_in(prompt: dict[str, dict[str, Any]]) -> list[str]:
    """Name the nodes of ours that run with a prompt: loaders that nothing stands for, and what is beside loaders."""
    classes = {name: comfyui_nodes.NODE_CLASS_MAPPINGS.get(node["class_type"]) for name, node in prompt.items()}
    found: set[str] = set()
    ways = [name for name in prompt if getattr(classes[name], "OUTPUT_NODE", False)]
    while ways:
        name = ways.pop()
        if name in found or name not in prompt:
            continue
        found.add(name)
        ways += [str(value[0]) for value in prompt[name]["inputs"].values() if isinstance(value, list) and value]
    ours = [name for name in sorted(found) if issubclass(classes[name] or object, CheckedNode)]
    return [f"{display_name(prompt[name]['class_type'])} #{name}" for name in ours]


def begin(comparison: Comparison) -> None:
    """Make a comparison the current one."""
    global _current
    _current = comparison


def look(comparison: Comparison) -> None:
    """Note where a run was taken out of the queue, so that it will never end."""
    queue = comparison.queue
    with queue.mutex:
        known = {item[1] for item in [*queue.queue, *queue.currently_running.values()]}
        for run in comparison.runs.values():
            if run.state in ("waits", "runs") and run.prompt_id not in known:
                run.state = "was taken out of the queue"


def around(executor: Any, prompt_id: str, extra_data: dict[str, Any]) -> Any:
    """Give what measures a prompt of the current comparison; None for any other prompt."""
    comparison = _current
    if comparison is None or extra_data.get(ASKS) != comparison.id:
        return None
    run = next((run for run in comparison.runs.values() if run.prompt_id == prompt_id), None)
    return None if run is None else _measured(comparison, run, executor)


@contextmanager
def _measured(comparison: Comparison, run: Run, executor: Any) -> Iterator[None]:
    quietly = never_raises("comparing with ComfyUI")
    quietly(_from_nothing)(executor)
    comparison.kept = quietly(manage.kept_by_others)() or []
    run.state = "runs"
    stop, began = quietly(_watch_ram)(run), time.monotonic()
    try:
        with tiers.left_out():
            yield
        run.seconds = time.monotonic() - began
    finally:
        if stop is not None:
            stop()
        quietly(_end)(comparison, run, executor)
        quietly(_from_nothing)(executor)


def _from_nothing(executor: Any) -> None:
    """Let a run find nothing that the one before has left."""
    manage.drop_outputs(executor)
    comfy.model_management.unload_all_models()
    collect_garbage()
    comfy.model_management.soft_empty_cache()


def _watch_ram(run: Run) -> Any:
    """Note the most memory of the process until the returned function is called."""
    process, ended = psutil.Process(), threading.Event()

    def watch() -> None:
        while True:
            run.rss = max(run.rss, process.memory_info().rss)
            if ended.wait(EVERY_SECONDS):
                return

    thread = threading.Thread(target=watch, name="spillway-compare", daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join()

    return stop


def _end(comparison: Comparison, run: Run, executor: Any) -> None:
    """Note how a run ended. The other one does not run where this one failed."""
    record = run_record.last_run()
    for node in list(record.nodes) if record is not None else ():
        kind, seconds = run.nodes.get(node.id, (node.kind, 0.0))
        run.nodes[node.id] = (kind, seconds + node.seconds)
        for device, nbytes in node.peaks.items():
            run.peaks[device] = max(run.peaks.get(device, 0), nbytes)
    state = "done" if executor.success and run.seconds else _why(executor)
    others = [other for other in comparison.runs.values() if other is not run]
    try:
        run.files = shown_files(getattr(executor, "history_result", None) or {})
        if state != "done":
            gone = {other.prompt_id for other in others}
            comparison.queue.delete_queue_item(lambda item: item[1] in gone)
        elif all(other.state == "done" for other in others):
            comparison.shown = compared(*(one.files for one in comparison.runs.values()))
    finally:
        run.state = state  # last: whoever asks takes a comparison that is done for all that will come


def _why(executor: Any) -> str:
    for event, data in reversed(executor.status_messages):
        if event == "execution_interrupted":
            return "was interrupted"
        if event == "execution_error":
            return f"failed: {str(data.get('exception_message', '')).strip()[:300]}"
    return "failed"


def install() -> None:
    """Measure the runs of comparisons from now on."""
    manage.around = around
