"""A pool of threads that fill host memory and begin its transfer, on the virtual clock."""

from __future__ import annotations

from functools import partial

from spillway.ops.device.readers import Work, do

from .clock import Clock, Thread


class Job:
    """A filling that was given to a reader. at: when it is done."""

    def __init__(self, clock: Clock, at: float = 0.0) -> None:
        self._clock = clock
        self.at = at
        self.error: BaseException | None = None

    def wait(self) -> None:
        """Let the current thread wait for the end. Raises the error of the filling."""
        self._clock.wait_until(self.at)
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """The reader has done it already, in its own time."""

    def then(self, call) -> Job:
        """Make the call when the work has ended, or now where that was before."""
        job = Job(self._clock, max(self.at, self._clock.thread.at))
        job.error = self.error
        if self.error is None and self.at > self._clock.thread.at:
            with self._clock.as_thread(Thread("sender", self.at)) as sender:
                job.end(call)
            job.at = sender.at
        elif self.error is None:
            job.end(call)
            job.at = self._clock.thread.at
        return job

    def end(self, call) -> None:
        """Make the call, and keep its error."""
        try:
            call()
        except BaseException as error:
            self.error = error


class VirtualReaders:
    """Readers take jobs in the order in which they were submitted, each the first that is free."""

    def __init__(self, clock: Clock, count: int) -> None:
        self.clock = clock
        self._aside = Thread("locking")
        self.threads = [Thread(f"reader {number + 1}") for number in range(count)]

    def submit(self, work: Work) -> Job:
        """Do the work on a reader, at the reader's time. What it waits for moves the reader, as do copies."""
        clock, job = self.clock, Job(self.clock)
        reader = min(self.threads, key=lambda thread: thread.at)
        reader.at = max(reader.at, clock.thread.at)
        with clock.as_thread(reader):
            job.end(partial(do, work))
        job.at = reader.at
        return job

    def aside(self, call):
        """Make the call at once, and let its result be there when the thread for such calls would have it."""
        clock, thread = self.clock, self._aside
        thread.at = max(thread.at, clock.thread.at)
        with clock.as_thread(thread):
            value = call()
        return Late(clock, thread.at, value)


class Late:
    """What a call returns, from a time on."""

    def __init__(self, clock: Clock, at: float, value) -> None:
        self._clock, self._at, self._value = clock, at, value

    def ready(self) -> bool:
        return self._at <= self._clock.thread.at

    def result(self):
        self._clock.wait_until(self._at)
        return self._value
