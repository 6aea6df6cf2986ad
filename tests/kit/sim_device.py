"""A simulated device for tests: its own memory, poisoned when allocated; copies take effect only when something waits.

A missing wait leaves the poison in place, which floating-point tensors show as NaN. A copy that is still enqueued when
its host buffer is overwritten, or that lands in a buffer after it was given to somebody else, shows as wrong values.
What a simulation that computes at once cannot show so is watched for, and raises Hazard: a copy into memory that the
main stream may still be using (the allocator hands it out while kernels that read it are queued), a host buffer that
is filled again before the host knows that the last copy out of it is done, or before a copy into it has begun, and
memory that goes before a copy of it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import torch

from kit.earlier_devices import forget
from spillway.ops.device.backend import Backend
from spillway.ops.device.readers import Returned, do
from spillway.ops.vbar import software as software_vbar

POISON = 0xFF  # NaN in fp8, fp16, bf16 and fp32


class Hazard(BaseException):
    """A missing wait. No Exception, so that no handler of the code under test takes it for a failure of the device."""


class _Place:
    """Where a copy reads or writes. It keeps no memory alive, unless it is to."""

    def __init__(self, tensor: torch.Tensor, keep: bool) -> None:
        storage = tensor.untyped_storage()
        self.storage = (lambda: storage) if keep else weakref.ref(storage)
        self.start, self.nbytes = tensor.storage_offset(), tensor.numel()

    def tensor(self) -> torch.Tensor:
        storage = self.storage()
        if storage is None:
            raise Hazard("memory went before a copy of it")
        return torch.empty(0, dtype=torch.uint8).set_(storage, self.start, (self.nbytes,))


class SimEvent:
    """The end of what a stream had been given when it was recorded; of the main stream where stream is None."""

    def __init__(self, device: SimDevice, stream: SimStream | None) -> None:
        self.device, self.stream = device, stream
        self.position = stream.given if stream is not None else device.clock

    def synchronize(self) -> None:
        """The host waits."""
        if self.stream is None:
            self.device.host_saw = max(self.device.host_saw, self.position)
            return
        self.stream.run_to(self.position)
        self.stream.host_knows = max(self.stream.host_knows, self.position)
        self.arrived()

    def arrived(self) -> list[_Place]:
        """Where the copies up to here went, each told once."""
        targets, tensors = self.stream.targets, []
        while targets and targets[0][0] <= self.position:
            tensors.append(targets.popleft()[1])
        return tensors

    def query(self) -> bool:
        if self.stream is None:
            return self.device.host_saw >= self.position
        if self.stream.done < self.position:
            return False
        self.stream.host_knows = max(self.stream.host_knows, self.position)
        return True


class SimStream:
    """Work in order. It runs when somebody waits for it or for something behind it; at once on an eager stream."""

    def __init__(self, eager: bool) -> None:
        self.eager = eager
        self.work: deque = deque()
        self.targets: deque = deque()
        self.given = self.done = 0
        self.host_knows = 0  # how much the host knows to be done
        self.saw = 0  # how far along the main stream it is known to be
        self.lock = threading.RLock()

    def give(self, work) -> None:
        with self.lock:
            self.work.append(work)
            self.given += 1
            if self.eager:
                self.run_to(self.given)

    def run_to(self, position: int) -> None:
        with self.lock:
            while self.done < position:
                self.done += 1
                self.work.popleft()()


class SimReaders:
    """Readers of which every other begins when somebody waits for it. Those of an eager device begin at once."""

    def __init__(self, device, eager) -> None:
        self.device, self.eager = device, eager
        self.waiting: deque = deque()
        self.given = 0

    def submit(self, work):
        self.given += 1
        job = SimJob(self, work)
        self.waiting.append(job)
        self.device.note_outstanding()
        if self.eager is True or self.given % 2 == 0:
            job.run()
        return job

    def aside(self, call):
        return Returned(call())


class SimJob:
    """Work that is done when somebody waits for it."""

    def __init__(self, readers, work) -> None:
        self.readers, self.work, self.error = readers, work, None
        self.calls: list = []

    def then(self, call):
        following = SimCall(self, call)
        if self.work is None:
            following.make()
        else:
            self.calls.append(following)
        return following

    def run(self) -> None:
        """Do it, and all that was submitted before."""
        waiting = self.readers.waiting
        while self in waiting:
            job = waiting.popleft()
            try:
                do(job.work)
            except BaseException as error:  # raised where the job is waited for, as a thread's is
                job.error = error
            job.work = None
            for following in job.calls:
                following.make()

    def wait(self) -> None:
        self.run()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        if self in self.readers.waiting:
            self.readers.waiting.remove(self)
        self.work = None


class SimCall:
    """A call that follows work."""

    def __init__(self, job, call) -> None:
        self.job, self.call, self.error = job, call, None

    def make(self) -> None:
        call, self.call = self.call, None
        self.error = self.job.error
        if call is not None and self.error is None:
            try:
                call()
            except BaseException as error:
                self.error = error

    def wait(self) -> None:
        self.job.run()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.call = None


class SimDevice(Backend):
    """A device with `capacity` bytes.

    eager: copies take effect at once, as on a fast bus; "some": on every other stream, so that one overtakes another.
    name: what the check before a first use knows it by; without one there is no check, as on a CPU.
    """

    streams = 2
    keeps_memory = False  # for as long as copies of it are under way, for devices that are at fault themselves

    def __init__(
        self,
        capacity: int = 1 << 30,
        *,
        eager: bool | str = False,
        streams: int = 2,
        pin_limit: int = 1 << 40,
        name: str | None = None,
    ) -> None:
        super().__init__(torch.device("cpu"))
        self.name = name
        self.capacity, self.eager, self.streams, self.pin_limit = capacity, eager, streams, pin_limit
        self.other = 0  # bytes used by others
        self.pinned = 0
        self.copies = 0
        self.most_outstanding = self.peak = 0
        self.all_streams: list[SimStream] = []
        self._readers = SimReaders(self, eager)
        # Of the main stream: how much it has been given, and how much of that the host knows to be done.
        self.clock = self.host_saw = 0
        # By storage. Of device memory: up to where the main stream uses it. Of host memory: by offset, what it held
        # when it was last copied from, and by whom.
        self.busy: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.read: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        forget(self.device)

    def identity(self):
        return self.name

    def empty(self, nbytes):
        memory = torch.full((nbytes,), POISON, dtype=torch.uint8)
        self._use(memory.untyped_storage())
        self.peak = max(self.peak, self.held())
        return memory

    def held(self) -> int:
        """Bytes of the memory that was given out and is still in somebody's hands."""
        return sum(storage.nbytes() for storage in self.busy)

    def _use(self, storage, start=0, end=None) -> None:
        """The main stream uses a range of bytes from now on."""
        self.clock += 1
        end = storage.nbytes() if end is None else end
        uses = self.busy.setdefault(storage, [])
        uses[:] = [use for use in uses if not (start <= use[0] and use[1] <= end)]
        uses.append((start, end, self.clock))

    def _in_use_until(self, memory) -> int:
        """When the main stream is done with this memory; 0 for host memory."""
        start, end = memory.storage_offset(), memory.storage_offset() + memory.numel()
        uses = self.busy.get(memory.untyped_storage(), ())
        return max((clock for low, high, clock in uses if low < end and start < high), default=0)

    def _check_use(self, memory, stream) -> None:
        if max(stream.saw, self.host_saw) < self._in_use_until(memory):
            raise Hazard("a side stream overtakes the main stream's use of this memory")

    def _check_content(self, source) -> None:
        start, end = source.storage_offset(), source.storage_offset() + source.numel()
        for at, (content, reader, position) in self.read.get(source.untyped_storage(), {}).items():
            low, high = max(at, start), min(at + content.numel(), end)
            if low >= high or reader.host_knows >= position:
                continue
            if not torch.equal(content[low - at : high - at], source[low - start : high - start]):
                raise Hazard("the host filled a buffer that a copy may still be reading")

    def host_empty(self, nbytes):
        if self.pinned + nbytes > self.pin_limit:
            raise RuntimeError("simulated: out of page-locked memory")
        self.pinned += nbytes
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def stream(self):
        stream = SimStream(self.eager is True or (self.eager == "some" and len(self.all_streams) % 2 == 0))
        self.all_streams.append(stream)
        return stream

    def readers(self):
        return self._readers

    def copy(self, target, source, stream):
        assert target.numel() == source.numel()
        self.copies += 1
        if stream is None:
            target.copy_(source)
            return
        self._check_use(target, stream)
        self._check_use(source, stream)
        from_host = not self._in_use_until(source)
        if from_host:
            self._check_content(source)
        position = stream.given + 1
        ends = [_Place(tensor, self.keeps_memory) for tensor in (target, source)]
        held = None if self._in_use_until(target) else target.clone()

        def work():
            target, source = (end.tensor() for end in ends)
            if held is not None and not torch.equal(target, held):
                raise Hazard("the host filled a buffer that a copy was yet to fill")
            target.copy_(source)
            if from_host:
                reads = self.read.setdefault(source.untyped_storage(), {})
                reads[source.storage_offset()] = (source.clone(), stream, position)

        stream.give(work)
        stream.targets.append((position, ends[0]))
        self.note_outstanding()

    def note_outstanding(self) -> None:
        """Count the transfers that are under way, or yet to be begun by a reader."""
        copies = sum(stream.given - stream.done for stream in self.all_streams)
        self.most_outstanding = max(self.most_outstanding, copies + len(self._readers.waiting))

    def record(self, stream):
        return SimEvent(self, stream)

    def wait(self, event, stream):
        if event is None or event.stream is stream:
            return
        if event.stream is None:
            stream.saw = max(stream.saw, event.position)
        elif stream is None:
            for place in event.arrived():
                storage = place.storage()
                if storage is not None and storage in self.busy:
                    self._use(storage, place.start, place.start + place.nbytes)  # it is read from now on
            event.stream.run_to(event.position)
        else:
            stream.give(lambda: event.stream.run_to(event.position))

    def synchronize(self):
        for stream in self.all_streams:
            SimEvent(self, stream).synchronize()
        self.host_saw = self.clock

    def memory(self):
        used = sum(vbar.used for vbar in software_vbar.memory_of(self).vbars)
        return max(0, self.capacity - self.other - used), self.capacity
