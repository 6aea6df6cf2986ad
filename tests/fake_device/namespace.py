"""What torch.cuda is with the fake device: its functions, streams, events and properties."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch

from .device import FakeDevice


def install(fake: FakeDevice) -> None:
    """Puts the functions of the fake device into torch.cuda."""
    for name, value in {**functions(fake), **memory_functions(fake)}.items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.memory, name):
            setattr(torch.cuda.memory, name, value)
    torch.cuda.default_generators = tuple(torch.Generator(f"cuda:{number}") for number in range(fake.count))
    torch.backends.cudnn.enabled = False


def index_of(fake: FakeDevice, device: Any = None) -> int:
    """The number of a device, as torch.cuda takes it: None, a number, a string, a torch.device."""
    if isinstance(device, int):
        index: int | None = device
    elif device is None:
        index = None
    else:
        device = torch.device(device)
        if device.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        index = device.index
    index = int(fake.library.fake_current_device()) if index is None else index
    if not 0 <= index < fake.count:
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")
    return index


class Stream(torch.Stream):
    """torch.cuda.Stream. cuda_stream: the driver's handle; 0 is the main stream."""

    def __new__(cls, device: Any = None, priority: int = 0, **known: Any) -> Stream:
        if known:
            return super().__new__(cls, **known)
        if device is None:
            device = torch.cuda.current_device()
        return super().__new__(cls, torch.device("cuda", device) if isinstance(device, int) else torch.device(device))

    @property
    def cuda_stream(self) -> int:
        return int(self.stream_id)

    def __repr__(self) -> str:
        return f"<fake torch.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x}>"


class ExternalStream(Stream):
    def __new__(cls, stream_ptr: int, device: Any = None) -> ExternalStream:
        number = torch.cuda.current_device() if device is None else torch.device(device).index
        return super().__new__(cls, stream_id=stream_ptr, device_index=number, device_type=1)


class Event(torch.Event):
    """torch.cuda.Event."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        return super().__new__(cls, "cuda", enable_timing=enable_timing, blocking=blocking)

    def record(self, stream: Any = None) -> None:
        super().record(torch.cuda.current_stream() if stream is None else stream)

    def wait(self, stream: Any = None) -> None:
        super().wait(torch.cuda.current_stream() if stream is None else stream)

    @property
    def cuda_event(self) -> int:
        return int(self.event_id)


class StreamContext:
    """torch.cuda.stream(stream): its device and the stream are current."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            self.device = torch.cuda.current_device()
            torch.cuda.set_device(self.stream.device_index)
            self.before = torch.cuda.current_stream()
            torch.cuda.set_stream(self.stream)

    def __exit__(self, *error: Any) -> None:
        if self.stream is not None:
            torch.cuda.set_stream(self.before)
            torch.cuda.set_device(self.device)


class Device:
    """torch.cuda.device(device)."""

    def __init__(self, device: Any) -> None:
        self.idx = torch.cuda._get_device_index(device, optional=True)

    def __enter__(self) -> None:
        self.before = torch.cuda.current_device()
        torch.cuda.set_device(self.idx)

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_device(self.before)


class Runtime:
    """torch.cuda.cudart()."""

    cudaError = types.SimpleNamespace(success=0)

    def __init__(self, fake: FakeDevice) -> None:
        self.fake = fake

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return self.fake.driver.result("cuMemHostRegister_v2", address, nbytes, flags)

    def cudaHostUnregister(self, address: int) -> int:
        return self.fake.driver.result("cuMemHostUnregister", address)

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:
        with self.fake.of(device):
            return self.fake.driver.memory()

    def cudaGetErrorString(self, error: int) -> str:
        return f"CUDA error {error}"


def functions(fake: FakeDevice) -> dict[str, Any]:
    """Devices, streams and random numbers."""
    index = functools.partial(index_of, fake)

    def current_stream(device: Any = None) -> Stream:
        number = index(device)
        handle = fake.library.fake_stream(number)
        return Stream(stream_id=handle, device_index=number, device_type=1)

    def default_stream(device: Any = None) -> Stream:
        return Stream(stream_id=0, device_index=index(device), device_type=1)

    def set_stream(stream: Any) -> None:
        fake.library.fake_set_stream(stream.device_index, stream.stream_id)

    def synchronize(device: Any = None) -> None:
        torch._C._accelerator_synchronizeDevice(index(device))

    def properties(device: Any = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            name="Fake CUDA device", major=8, minor=9, total_memory=fake.get("capacity", index(device)),
            multi_processor_count=1, gcnArchName="", warp_size=32, is_integrated=False, L2_cache_size=1 << 20,
            uuid=f"fake-{index(device)}",
        )  # fmt: skip

    def manual_seed_all(seed: int) -> None:
        for number in range(fake.count):
            fake.library.fake_seed(number, seed % 2**64)

    return {
        "Stream": Stream,
        "ExternalStream": ExternalStream,
        "Event": Event,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "device": Device,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": set_stream,
        "synchronize": synchronize,
        "_get_device_index": lambda device, optional=False, allow_cpu=False: index(device),
        "current_device": lambda: int(fake.library.fake_current_device()),
        "set_device": lambda device: fake.library.fake_set_device(index(device)),
        "device_count": lambda: fake.count,
        "_exchange_device": lambda number: _exchange_device(fake, number),
        "_maybe_exchange_device": lambda number: _exchange_device(fake, number),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "get_device_properties": properties,
        "get_device_name": lambda device=None: properties(device).name,
        "get_device_capability": lambda device=None: (8, 9),
        "get_arch_list": lambda: ["sm_89"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "can_device_access_peer": lambda device, peer: False,
        "ipc_collect": lambda: None,
        "cudart": functools.partial(Runtime, fake),
        "manual_seed": lambda seed: fake.library.fake_seed(index(), seed % 2**64),
        "manual_seed_all": manual_seed_all,
        "get_rng_state": lambda device="cuda": _default_generator(device, index).get_state(),
        "set_rng_state": lambda state, device="cuda": _default_generator(device, index).set_state(state) and None,
    }


def _exchange_device(fake: FakeDevice, number: int) -> int:
    before = int(fake.library.fake_current_device())
    if number >= 0:
        fake.library.fake_set_device(index_of(fake, number))
    return before


def _default_generator(device: Any, index: Any) -> torch.Generator:
    return torch.cuda.default_generators[index(device)]


def memory_functions(fake: FakeDevice) -> dict[str, Any]:
    """Figures of memory."""
    index = functools.partial(index_of, fake)

    def figure(what: str) -> Any:
        return lambda device=None: fake.memory(what, index(device))

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        with fake.of(index(device)):
            return fake.driver.memory()

    def memory_stats(device: Any = None) -> dict[str, int]:
        number = index(device)
        stats = {"num_alloc_retries": 0, "num_ooms": fake.memory("refused", number)}
        for kind, now, peak in (
            ("reserved", "reserved", "reserved_peak"),
            ("allocated", "used", "peak"),
            ("active", "used", "peak"),
            ("requested", "used", "peak"),
        ):
            stats[f"{kind}_bytes.all.current"] = fake.memory(now, number)
            stats[f"{kind}_bytes.all.peak"] = fake.memory(peak, number)
        return stats

    return {
        "mem_get_info": mem_get_info,
        "memory_stats": memory_stats,
        "memory_allocated": figure("used"),
        "max_memory_allocated": figure("peak"),
        "memory_reserved": figure("reserved"),
        "max_memory_reserved": figure("reserved_peak"),
        "reset_peak_memory_stats": lambda device=None: fake.library.fake_reset_peak(index(device)),
        "empty_cache": fake.drop_cached,
        "memory_summary": lambda device=None, abbreviated=False: str(memory_stats(device)),
        "get_allocator_backend": lambda: "cudaMallocAsync",
    }
