"""Backends: allocate, copy on side streams, wait. One class per type of device, chosen by `backend_for`.

The protocol is that of a CUDA device. Tests put a simulated device in its place, whose copies take effect only when an
event is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol, TypeVar

import torch

from ..errors import SpillwayError
from ..ledger import first_line, in_words
from ..ram.apart import memory_apart
from ..ram.available import recent_ram
from ..ram.shortage import obtain
from .identity import identity
from .locked_memory import locked
from .out_of_memory import is_out_of_memory
from .readers import Inline, Readers, threads

T = TypeVar("T")
# Gives (free, total) bytes of a device.
MemoryFigures = Callable[[torch.device], tuple[int, int]]
# Types of devices that compute on the host's memory, or share it.
HOST_MEMORY = ("cpu", "mps")


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Block this thread until the work before the event is done."""

    def query(self) -> bool:
        """Say whether the work before the event is done."""


class Backend:
    """A device whose transfers are synchronous: MPS, DirectML and every other device without streams.

    in_place: the device computes on host memory, so a weight of the right form needs no copy at all.
    aimdo_device: the number under which comfy-aimdo may know the device; None where it cannot.
    locks_memory: False: the user wants no page-locked memory. reserved: bytes that the user leaves to others.
    unwrapped: the backend itself, without the CarefulBackend around it.
    """

    in_place = False
    streams = 0
    aimdo_device: int | None = None
    locks_memory = True
    reserved = 0

    def __init__(self, device: torch.device, memory: MemoryFigures | None = None) -> None:
        self.device = device
        self.unwrapped: Backend = self
        self._figures = memory

    def identity(self) -> str | None:
        """Name the device and the versions that use it; None where there is nothing that could be wrong."""
        return identity(self.device)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` of uninitialised uint8 memory on the device.

        Never an inference tensor, which later code outside inference mode could not write to.
        """
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def lasting(self, nbytes: int) -> torch.Tensor:
        """Allocate memory of the device for a weight that stays. Else as `empty`."""
        return self.empty(nbytes)

    def host_empty(self, nbytes: int) -> torch.Tensor:
        """Return uint8 host memory, page-locked where the device gains from it. Raises RuntimeError where refused."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> Any:
        """Return a new offload stream; None on a device without streams."""
        return None

    def readers(self) -> Readers:
        """Return whoever gathers weights and starts their transfers."""
        return Inline()

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Enqueue target <- source on the stream; None is the main stream."""
        target.copy_(source)

    def record(self, stream: Any) -> Event | None:
        """Return an event after the work that the stream has been given so far; None is the main stream."""
        return None

    def timer(self, stream: Any) -> Event | None:
        """Return such an event for `seconds_between`; None on a device that tells no times."""
        return None

    def seconds_between(self, start: Any, end: Any) -> float:
        """Return the seconds between two such events, which the device has come to."""
        raise NotImplementedError

    def wait(self, event: Event | None, stream: Any) -> None:
        """Let later work of `stream` (None is the main stream) wait for the event. This thread goes on."""

    def synchronize(self) -> None:
        """Block this thread until the device has done all work."""

    def retry_once(
        self,
        call: Callable[..., T],
        *arguments: Any,
        errors: tuple[type[Exception], ...] = (RuntimeError,),
        then: Callable[[Exception], None] | None = None,
    ) -> T:
        """Return the call's result. Where the call raises one of `errors`, synchronise and call once more.

        then: told of the first error, once synchronised. Raises the error of the second call, and DeviceError where the
        device cannot be synchronised.
        """
        try:
            return call(*arguments)
        except errors as error:
            self.synchronize()
            if then is not None:
                then(error)
        return call(*arguments)

    def current(self) -> AbstractContextManager[Any]:
        """Make this the current device, which driver calls and comfy-aimdo's look at free memory ask."""
        return nullcontext()

    def memory(self) -> tuple[int, int]:
        """Return (free, total) bytes that weights could take on the device.

        The RAM that this process can have stands in for a device that shares it, or that nobody can ask.
        """
        if self._figures is not None:
            return self._figures(self.device)
        if self.device.type not in HOST_MEMORY:
            module = torch.get_device_module(self.device)
            if hasattr(module, "mem_get_info"):
                return with_idle(module, self.device)
        ram = recent_ram()
        return ram.available, ram.total

    def free_in_words(self) -> str:
        """Word what is free, and the limit that this minds where there is one beside the device's size."""
        free, _ = self.memory()
        return f"{in_words(free)} free{self.limit_in_words()}"

    def limit_in_words(self) -> str:
        """Word the limit of the free memory, with a space before it. Empty where that is the device's size."""
        return ""

    def settle(self) -> None:
        """Wait for the device before memory is freed, in whichever thread that happens.

        A thread that has never used the device has no context, in which a driver's own wait fails without a word.
        """
        with suppress(RuntimeError), self.current():
            self.synchronize()


def with_idle(module: Any, device: torch.device) -> tuple[int, int]:
    """Return (free, total). Memory that torch's allocator holds but does not use is as good as free."""
    free, total = module.mem_get_info(device)
    idle = 0
    if hasattr(module, "memory_reserved") and hasattr(module, "memory_allocated"):
        idle = module.memory_reserved(device) - module.memory_allocated(device)
    return free + max(0, idle), total


class CpuBackend(Backend):
    """The CPU: weights are used where they lie."""

    in_place = True

    def identity(self) -> None:
        return None

    def empty(self, nbytes: int) -> torch.Tensor:
        return obtain(lambda: super(CpuBackend, self).empty(nbytes), nbytes, "a weight")

    def lasting(self, nbytes: int) -> torch.Tensor:
        return obtain(lambda: memory_apart(nbytes), nbytes, "a weight")

    def limit_in_words(self) -> str:
        ram = recent_ram()
        return "" if ram.of_machine else f" of {ram.reason}"


# cudaHostRegisterPortable: locked for every device, not for the current device alone.
PORTABLE = 1


class StreamBackend(Backend):
    """CUDA, ROCm and XPU: side streams, events, page-locked host memory."""

    streams = 2

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._module: Any = torch.get_device_module(device)
        if device.type == "cuda":  # ROCm too
            self.aimdo_device = device.index

    def host_empty(self, nbytes: int) -> torch.Tensor:
        if not self.locks_memory:
            return torch.empty(nbytes, dtype=torch.uint8)
        if self.device.type != "cuda":
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return locked(nbytes, self._lock, self._unlock)

    def _lock(self, address: int, nbytes: int) -> None:
        code = int(self._module.cudart().cudaHostRegister(address, nbytes, PORTABLE))
        if code:
            self._forget_error()
            raise RuntimeError(f"cudaHostRegister of {nbytes} bytes failed with code {code}")

    def _unlock(self, address: int) -> bool:
        code = int(self._module.cudart().cudaHostUnregister(address))
        if code:
            self._forget_error()
        return code == 0

    def _forget_error(self) -> None:
        """Make a call that takes the driver's failure, which would else be raised in a call of somebody else."""
        with suppress(RuntimeError):
            torch.ones(1, device=self.device)

    def stream(self) -> Any:
        return self._module.Stream(device=self.device)

    def readers(self) -> Readers:
        return threads()

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        with self._module.stream(stream):
            # A copy on the main stream blocks this thread, as on a device without streams.
            target.copy_(source, non_blocking=stream is not None)

    def record(self, stream: Any) -> Any:
        event = self._module.Event()
        event.record(stream or self._module.current_stream(self.device))
        return event

    def timer(self, stream: Any) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record(stream or self._module.current_stream(self.device))
        return event

    def seconds_between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def wait(self, event: Any, stream: Any) -> None:
        if event is not None:
            (stream or self._module.current_stream(self.device)).wait_event(event)

    def current(self) -> AbstractContextManager[Any]:
        return self._module.device(self.device)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        self._module.synchronize(self.device)

    def memory(self) -> tuple[int, int]:
        return with_idle(self._module, self.device)


class DeviceError(SpillwayError, RuntimeError):
    """A device that does not exist, cannot hold weights, or does not answer any more."""


def backend_for(device: str | torch.device, memory: MemoryFigures | None = None) -> Backend:
    """Return the backend of a device. Raises DeviceError, with the devices there are, for any other.

    memory: whom to ask for the memory of a device that is neither a CPU nor one with streams.
    """
    try:
        found = torch.device(device)
        if found.type not in ("cpu", "meta"):
            torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if not is_out_of_memory(error):  # a device that other weights fill is there, and they give way
            raise DeviceError(
                f"device '{device}' cannot be used ({first_line(error)}). This machine has: {', '.join(_devices())}."
            ) from None
    if found.type == "meta":
        raise DeviceError("device 'meta' holds no data; choose cpu or an accelerator.")
    if found.type == "cpu":
        return CpuBackend(found)
    if found.type in ("cuda", "xpu"):
        if found.index is None:
            found = torch.device(found.type, torch.get_device_module(found).current_device())
        return StreamBackend(found)
    return Backend(found, None if found.type in HOST_MEMORY else memory)


def _devices() -> list[str]:
    """List the devices of this machine, by torch's names."""
    names = ["cpu"]
    for device_type in ("cuda", "xpu", "mps"):
        module = getattr(torch, device_type, None)
        if module is not None and module.is_available():
            count = module.device_count() if hasattr(module, "device_count") else 1
            names += [f"{device_type}:{index}" for index in range(count)]
    return names
