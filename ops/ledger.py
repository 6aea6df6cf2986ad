"""The ledger of a model's weights, in numbers and in words. Logs, nodes and tests read it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count

log = logging.getLogger("spillway")

_numbers = count(1)  # of ledgers, and of notices
# A shorter wait is the price of a look, and no stall.
STALL_SECONDS = 1e-4


@dataclass
class Counters:
    """Count since the model was created. All sizes in bytes."""

    bytes_loaded: int = 0  # put into the VBAR, to stay
    bytes_streamed: int = 0  # brought for one use only
    bytes_written_back: int = 0
    faults: int = 0  # faults that were granted
    misses: int = 0  # faults that found no room
    hits: int = 0  # granted, and the data was still there
    evictions: int = 0
    patched: int = 0  # tensors whose patches were computed
    quantised: int = 0  # tensors that were quantised to INT8
    patch_changes: int = 0  # times that other patches were attached: a LoRA, or hooks between two conditions
    write_backs: int = 0
    reads: int = 0  # loans to operations outside of a layer's forward
    rows: int = 0  # of tables, brought for lookups
    prefetched: int = 0  # bundles begun before they were asked for
    stalls: int = 0  # times the launching thread waited for a reader to bring what it needs
    stall_seconds: float = 0.0  # that it waited then
    retries: int = 0  # layers run again after an out-of-memory error
    steps: int = 0
    graphs_compiled: int = 0  # by torch.compile, for blocks of this model
    compile_seconds: float = 0.0  # calls of blocks in which something was compiled


@dataclass(frozen=True)
class Step:
    """A step. streamed: bytes brought for it alone, in the mean of this use. seconds: that the last one took.

    last: bytes brought in the last one that another followed. stalled: seconds of `seconds` for which the launching
    thread waited for readers.
    """

    streamed: int = 0
    seconds: float = 0.0
    last: int = 0
    stalled: float = 0.0


@dataclass
class Ledger:
    """Counters and decisions of one model.

    number: of this ledger in the process. notices: (number, text) of what a user should hear of: warnings, and
    evictions that cost something. step: the last one that has ended. quiet: decisions are not logged.
    """

    name: str = "model"
    counters: Counters = field(default_factory=Counters)
    decisions: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    number: int = field(default_factory=lambda: next(_numbers))
    notices: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=20))
    step: Step = field(default_factory=Step)
    quiet: bool = False
    _began: float | None = None  # when the running step began
    _brought: int = 0  # bytes streamed for the steps before the running one
    _waited: float = 0.0  # seconds of stalls before the running one
    _before: tuple[int, int] = (0, 0)  # steps, and bytes streamed, before this use
    _said: set[str] = field(default_factory=set)
    _summarised: Counters = field(default_factory=Counters)

    def decide(self, text: str, *, level: int = logging.INFO) -> None:
        """Record a decision and the reason for it; repeats of the last one are dropped."""
        if self.decisions and self.decisions[-1] == text:
            return
        self.decisions.append(text)
        if level >= logging.WARNING:
            self.notice(text)
        if not self.quiet:
            log.log(level, "[Spillway] %s: %s", self.name, text)

    def decide_once(self, text: str, *, level: int = logging.WARNING) -> None:
        """Record a decision that would otherwise repeat at every layer."""
        if text not in self._said:
            self._said.add(text)
            self.decide(text, level=level)

    def notice(self, text: str) -> None:
        """Keep what a user should hear of, wherever they look."""
        self.notices.append((next(_numbers), text))

    def begin_step(self, ahead: int = 0) -> None:
        """Count a step. The one before has ended. ahead: bytes that were streamed for this one already."""
        brought = self.counters.bytes_streamed - ahead
        self._end_step(brought)
        self.counters.steps += 1
        self._began, self._brought, self._waited = time.monotonic(), brought, self.counters.stall_seconds

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Count what is done inside as a stall of the thread that launches, if it takes a while."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            if seconds >= STALL_SECONDS:
                self.counters.stalls += 1
                self.counters.stall_seconds += seconds

    def begin_use(self) -> None:
        """Begin a row of like steps. The time until the first of them is no step's."""
        self._began, self._before = None, (self.counters.steps, self.counters.bytes_streamed)

    def mean_streamed(self) -> int:
        """Count the bytes that a step of this use brought for it alone, in the mean of all so far."""
        steps, streamed = self._before
        return (self.counters.bytes_streamed - streamed) // max(1, self.counters.steps - steps)

    def _end_step(self, brought: int | None) -> None:
        """Note what the step took. brought: bytes streamed for steps so far, None where that is not known."""
        if self._began is not None:
            mean = self.mean_streamed()
            last = self.step.last if brought is None else brought - self._brought
            stalled = self.counters.stall_seconds - self._waited
            self.step, self._began = Step(mean, time.monotonic() - self._began, last, stalled), None

    def summarise(self, resident: int, total: int) -> None:
        """Log what was done since the last summary. The last step has ended. Sizes in bytes."""
        self._end_step(None)
        now, before = self.counters, self._summarised
        steps = now.steps - before.steps
        log.info(
            "[Spillway] %s: %s of %s resident; since the last report %d steps, %s streamed, %s loaded, %d evictions",
            self.name,
            in_words(resident),
            in_words(total),
            steps,
            in_words(now.bytes_streamed - before.bytes_streamed),
            in_words(now.bytes_loaded - before.bytes_loaded),
            now.evictions - before.evictions,
        )
        self._summarised = replace(now)

    def as_dict(self) -> dict[str, object]:
        """Give counters and decisions as data for JSON."""
        return {"name": self.name, "counters": asdict(self.counters), "decisions": list(self.decisions)}


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without the advice that torch puts below it.

    Where the line only announces the reason, as that of a compiler's failure does, the next one is said too.
    """
    try:
        text = str(error)
    except Exception:  # of others' classes, by which what catches an error must not fail
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first, *more = lines or [type(error).__name__]
    return f"{first} {more[0]}" if more and first.endswith(":") else first


def in_words(nbytes: float) -> str:
    """Return a size for a person: '3.1 GiB', '12.0 MiB', '512 B'."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(nbytes) >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{int(nbytes)} B"
