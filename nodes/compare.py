"""Runs a graph once through ComfyUI's loaders and once through Spillway's, and says what each run took."""

from __future__ import annotations

import copy
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfyui_version
import folder_paths
import numpy
import psutil
import torch
from PIL import Image

from ..cache.comfyui import tiers
from ..ops.ledger import in_words
from ..ops.never_raises import never_raises
from ..ops.ram.garbage import collect_garbage
from ..patcher.comfyui import run_record
from . import manage

ASKS = "spillway_compare"  # in a prompt's extra_data: the comparison's id
KINDS = ("ComfyUI", "Spillway")
EVERY_SECONDS = 0.05
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_PIXELS = 1 << 28


@dataclass
class Run:
    """What one run took. state: 'waits', 'runs', 'done', or in words why it ended. files: (node, place, path)."""

    prompt_id: str
    state: str = "waits"
    seconds: float = 0.0
    rss: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    files: list[tuple[str, int, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"state": self.state, "seconds": self.seconds, "rss": self.rss, "peaks": self.peaks}


class Comparison:
    """Two runs of one graph. `around` measures them where the server's worker runs them."""

    def __init__(self, queue: Any, same: list[str]) -> None:
        """queue: the server's. same: what could not be converted, and is Spillway's in both runs."""
        self.queue, self.id = queue, str(uuid.uuid4())
        self.runs = {kind: Run(str(uuid.uuid4())) for kind in KINDS}
        self.same = same
        self.kept: list[str] = []  # models that a pack kept from the first run to the second
        self.pictures: dict[str, Any] | None = None
        self.device = str(comfy.model_management.get_torch_device())

    @property
    def state(self) -> str:
        """Say 'runs', 'done', or why it ended."""
        states = [run.state for run in self.runs.values()]
        ended = [state for state in states if state not in ("waits", "runs", "done")]
        return ended[0] if ended else "done" if states == ["done", "done"] else "runs"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        runs = {kind: run.as_dict() for kind, run in self.runs.items()}
        told = {"id": self.id, "state": self.state, "runs": runs, "pictures": self.pictures}
        told |= {"same": self.same, "kept": self.kept}
        return {**told, "text": self.text() if self.state == "done" else None}

    def text(self) -> str:
        """Say it in words, for others to read."""
        theirs, ours = self.runs.values()
        rows = [("seconds", f"{theirs.seconds:.1f}", f"{ours.seconds:.1f}")]
        rows.append(("most RAM of the process", in_words(theirs.rss), in_words(ours.rss)))
        for device in sorted({*theirs.peaks, *ours.peaks}):
            rows.append((f"most of {device}", *(in_words(run.peaks.get(device, 0)) for run in (theirs, ours))))
        lines = [f"{'':<26}{KINDS[0]:>12}{KINDS[1]:>12}", *(f"{name:<26}{a:>12}{b:>12}" for name, a, b in rows)]
        lines += ["", in_sentence(self.pictures or {})]
        if self.same:
            lines.append(f"Spillway's in both runs, as ComfyUI has nothing like it: {', '.join(self.same)}.")
        if self.kept:
            lines.append(f"The second run had models of the first, which another pack keeps: {', '.join(self.kept)}.")
        lines.append(
            "Each run began with no model loaded and nothing cached. ComfyUI's was the first, so the second found "
            "files in the page cache."
        )
        versions = f"ComfyUI {comfyui_version.__version__}, torch {torch.__version__}, {self.device}"
        return "\n".join([f"The same graph through ComfyUI's loaders and through Spillway's ({versions}):", "", *lines])


def in_sentence(pictures: dict[str, Any]) -> str:
    """Say whether the pictures are equal."""
    count, equal = pictures.get("count", 0), pictures.get("equal", 0)
    if not count:
        return "The graph shows no pictures that could be compared."
    if count == equal:
        return f"Pictures: {count} of {count} are equal, pixel by pixel."
    return f"Pictures: {equal} of {count} are equal; others differ by up to {pictures.get('most', 255)} of 255."


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
        for device, nbytes in node.peaks.items():
            run.peaks[device] = max(run.peaks.get(device, 0), nbytes)
    run.state = "done" if executor.success and run.seconds else _why(executor)
    run.files = shown_files(getattr(executor, "history_result", None) or {})
    if run.state != "done":
        others = {other.prompt_id for other in comparison.runs.values() if other is not run}
        comparison.queue.delete_queue_item(lambda item: item[1] in others)
    elif comparison.state == "done":
        comparison.pictures = compared(*(one.files for one in comparison.runs.values()))


def _why(executor: Any) -> str:
    for event, data in reversed(executor.status_messages):
        if event == "execution_interrupted":
            return "was interrupted"
        if event == "execution_error":
            return f"failed: {str(data.get('exception_message', '')).strip()[:300]}"
    return "failed"


def shown_files(history: dict[str, Any]) -> list[tuple[str, int, str]]:
    """List the pictures that nodes show, as (node, place among its pictures, path)."""
    found = []
    for node, shown in (history.get("outputs") or {}).items():
        for place, entry in enumerate(shown.get("images") or ()):
            base = folder_paths.get_directory_by_type(entry.get("type", "")) if isinstance(entry, dict) else None
            name = str(entry.get("filename") or "") if isinstance(entry, dict) else ""
            if base and name.lower().endswith(PICTURES):
                found.append((str(node), place, os.path.join(base, entry.get("subfolder", ""), name)))
    return found


def compared(theirs: list[tuple[str, int, str]], ours: list[tuple[str, int, str]]) -> dict[str, Any]:
    """Compare pictures pixel by pixel. A picture that one run alone has counts as another one."""
    one, other = ({(node, place): path for node, place, path in files} for files in (theirs, ours))
    most = equal = 0
    for key in {*one, *other}:
        apart = 255 if key not in one or key not in other else difference(one[key], other[key])
        equal += apart == 0
        most = max(most, apart)
    return {"count": len({*one, *other}), "equal": equal, "most": most}


def difference(one: str | Path, other: str | Path) -> int:
    """Return the largest difference of two pictures' numbers. 255 where they have different sizes."""
    with Image.open(one) as first, Image.open(other) as second:
        if first.size != second.size or first.width * first.height > MOST_PIXELS:
            return 255
        pixels = [numpy.asarray(picture.convert("RGBA"), dtype=numpy.int16) for picture in (first, second)]
    return int(numpy.abs(pixels[0] - pixels[1]).max(initial=0))


def install() -> None:
    """Measure the runs of comparisons from now on."""
    manage.around = around
