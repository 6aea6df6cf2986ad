"""The simulated driver from Python: its functions, settings, statistics and faults."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from . import build

INVALID_VALUE, OUT_OF_MEMORY, NOT_READY = 1, 2, 600
POISON = 0xFF  # NaN in fp8, fp16, bf16 and fp32
FOR_EVER = -1

# Left behind by nobody once every model is closed.
LEAKS = ("mapped", "handles", "reserved", "pinned", "allocated", "pending")

u64, size_t, pointer = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
SIGNATURES = {
    "cuMemAlloc_v2": [ctypes.POINTER(u64), size_t],
    "cuMemFree_v2": [u64],
    "cuMemAllocAsync": [ctypes.POINTER(u64), size_t, pointer],
    "cuMemFreeAsync": [u64, pointer],
    "cuMemGetInfo_v2": [ctypes.POINTER(size_t), ctypes.POINTER(size_t)],
    "cuMemHostRegister_v2": [pointer, size_t, ctypes.c_uint],
    "cuMemHostUnregister": [pointer],
    "cuMemAddressReserve": [ctypes.POINTER(u64), size_t, size_t, u64, u64],
    "cuMemAddressFree": [u64, size_t],
    "cuMemCreate": [ctypes.POINTER(u64), size_t, pointer, u64],
    "cuMemMap": [u64, size_t, size_t, u64, u64],
    "cuMemSetAccess": [u64, size_t, pointer, size_t],
    "cuMemUnmap": [u64, size_t],
    "cuMemRelease": [u64],
    "cuMemcpyHtoD_v2": [u64, pointer, size_t],
    "cuMemcpyDtoH_v2": [pointer, u64, size_t],
    "cuMemcpyHtoDAsync_v2": [u64, pointer, size_t, pointer],
    "cuMemcpyDtoHAsync_v2": [pointer, u64, size_t, pointer],
    "cuStreamCreate": [ctypes.POINTER(pointer), ctypes.c_uint],
    "cuStreamDestroy_v2": [pointer],
    "cuStreamSynchronize": [pointer],
    "cuStreamWaitEvent": [pointer, pointer, ctypes.c_uint],
    "cuEventCreate": [ctypes.POINTER(pointer), ctypes.c_uint],
    "cuEventDestroy_v2": [pointer],
    "cuEventRecord": [pointer, pointer],
    "cuEventQuery": [pointer],
    "cuEventSynchronize": [pointer],
    "cuCtxSynchronize": [],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
}


class DriverError(RuntimeError):
    """A driver function failed, in the words that torch uses."""

    def __init__(self, function: str, code: int, text: str) -> None:
        super().__init__(f"CUDA error: {text} ({function})")
        self.code = code


class Driver:
    """The driver of this process: it is loaded for good, as the real one would be."""

    def __init__(self) -> None:
        # Global, so that comfy-aimdo finds it.
        self.library = ctypes.CDLL(str(build.driver()), mode=ctypes.RTLD_GLOBAL)
        for name, arguments in SIGNATURES.items():
            getattr(self.library, name).argtypes = arguments
        self.library.sim_get.argtypes = [ctypes.c_char_p]
        self.library.sim_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
        self.library.sim_fail.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self.library.sim_is_device_memory.argtypes = [u64, size_t]
        for name in ("sim_get", "sim_calls", "sim_failed"):
            getattr(self.library, name).restype = ctypes.c_int64

    # -- its functions

    def result(self, function: str, *arguments: object) -> int:
        """Call a driver function; its error code."""
        return int(getattr(self.library, function)(*arguments))

    def call(self, function: str, *arguments: object) -> None:
        """Call a driver function. Raises DriverError where it fails."""
        code = self.result(function, *arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(function.removesuffix("_v2"), code, (text.value or b"").decode())

    def make(self, function: str, *arguments: object, kind: type = u64) -> int:
        """Call a driver function that writes an address or a handle into its first argument; what it wrote."""
        out = kind()
        self.call(function, ctypes.byref(out), *arguments)
        return int(out.value or 0)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        free, total = size_t(), size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def is_device_memory(self, address: int, nbytes: int = 1) -> bool:
        """Whether all of a range could be accessed on the device now."""
        return bool(self.library.sim_is_device_memory(address, nbytes))

    # -- what tests control

    def set(self, **settings: int) -> None:
        """capacity, others (bytes that other processes hold), pin_limit, poison (-1: none), deferred, trace."""
        for name, value in settings.items():
            if self.library.sim_set(name.encode(), int(value)):
                raise KeyError(name)

    def get(self, name: str) -> int:
        """A setting, or a statistic: mapped, allocated, pinned, reserved, handles, peak, illegal, ..."""
        value = int(self.library.sim_get(name.encode()))
        if value == -1 and name != "poison":
            raise KeyError(name)
        return value

    def fail(self, function: str, times: int = 1, *, after: int = 0, error: int = INVALID_VALUE) -> None:
        """Let a function succeed `after` times and then fail `times` times; FOR_EVER, or 0 for never again."""
        if self.library.sim_fail(function.encode(), after, times, error):
            raise KeyError(function)

    @contextmanager
    def failing(self, function: str, times: int = 1, *, after: int = 0, error: int = INVALID_VALUE) -> Iterator[None]:
        """The same for the length of a block."""
        self.fail(function, times, after=after, error=error)
        try:
            yield
        finally:
            self.library.sim_fail(function.encode(), 0, 0, 0)

    def calls(self, function: str) -> int:
        """How often a function was called since the last reset."""
        return int(self.library.sim_calls(function.encode()))

    def failed(self, function: str) -> int:
        """How often it failed as it was last told to."""
        return int(self.library.sim_failed(function.encode()))

    def no_faults(self) -> None:
        """Nothing fails any more."""
        self.library.sim_no_faults()

    def reset(self) -> None:
        """Counters at zero, no faults, no error kept. What is allocated stays."""
        self.library.sim_reset()

    def leaks(self) -> dict[str, int]:
        """What should be zero once everything is given back, and is not."""
        return {name: value for name in LEAKS if (value := self.get(name))}


_driver: Driver | None = None


def load_driver() -> Driver:
    """The driver of this process. Raises Unavailable where it cannot be built."""
    global _driver
    if _driver is None:
        _driver = Driver()
    return _driver
