"""The VBAR of comfy-aimdo (0.3.0 and later): device pages mapped by its native library.

Nothing here initialises devices that ComfyUI has initialised already: a second initialisation tears live hooks down.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..device.backend import Backend, DeviceError
from ..ledger import Ledger
from . import cap
from .protocol import lock

PAGE = 32 << 20
RESIDENT = 1

_ranks = itertools.count(1)
# Weak: a model that is dropped without being closed takes its memory with it.
_open: weakref.WeakSet[AimdoVBAR] = weakref.WeakSet()


class AimdoSlice(NamedTuple):
    """An allocation. handle: comfy-aimdo's own. offset, nbytes: its bytes from the start of the range."""

    handle: Any
    offset: int
    nbytes: int


def serves(backend: Backend, may_init: bool = False) -> tuple[bool, str]:
    """Say whether comfy-aimdo can hold weights for a device, and the reason in words.

    may_init: initialise the device where nobody has (the engine used alone). In ComfyUI, ComfyUI decides that.
    """
    index = backend.aimdo_device
    if index is None:
        return False, f"comfy-aimdo serves CUDA and ROCm devices, not {backend.device.type}"
    try:
        import comfy_aimdo.control as control
    except ImportError as error:
        return False, f"comfy-aimdo is not installed ({error})"
    if getattr(control, "lib", None) is None and not (may_init and control.init()):
        return False, "comfy-aimdo is not initialised (dynamic VRAM is off or the device is not supported)"
    if not getattr(control, "devctxs", None):
        if not may_init:
            return False, "comfy-aimdo has no device initialised (dynamic VRAM is off)"
        init = getattr(control, "init_devices", None)
        if not (init([index]) if init is not None else control.init_device(index)):
            return False, f"comfy-aimdo could not initialise device {index}"
    return True, "comfy-aimdo serves the device"


class AimdoVBAR:
    """comfy-aimdo's range of addresses. nbytes: how many to reserve; comfy-aimdo clamps them to the device's capacity.

    failure: the driver's words, once a call failed twice. From then on every fault is refused. Raises RuntimeError or
    MemoryError where no addresses can be had.
    """

    kind = "aimdo"
    unit = PAGE
    follows_free_memory = True  # comfy-aimdo hooks the driver's allocator

    def __init__(self, backend: Backend, nbytes: int, ledger: Ledger, headroom: int = 0) -> None:
        import comfy_aimdo.model_vbar as model_vbar
        import comfy_aimdo.torch as aimdo_torch

        self._api = model_vbar
        self._to_tensor = aimdo_torch.aimdo_to_tensor
        self.backend, self.ledger, self.headroom = backend, ledger, headroom
        self.device = backend.device
        self.failure: str | None = None
        self.limit: int | None = None
        self._offset = 0
        self._peak = 0
        self._granted: dict[int, int] = {}  # bytes by offset of what had its pages lately
        with lock:
            self._vbar: Any = model_vbar.ModelVBAR(nbytes, backend.aimdo_device)
            self.capacity = self._vbar.get_nr_pages() * PAGE
        # Its own `__del__` would free it without the lock when the last slice is dropped, and native calls from two
        # threads crash.
        self._free = weakref.finalize(self, _free, self._vbar, backend)
        self._free.atexit = False
        self.rank = next(_ranks)  # as comfy-aimdo has it
        _open.add(self)
        cap.opened(self)

    def alloc(self, nbytes: int, on_evict: Callable[[], None] | None = None) -> AimdoSlice | None:
        """Reserve `nbytes`; None where the range is full. `on_evict` is never called: signatures tell of evictions."""
        if self._offset + nbytes > self.capacity:
            return None
        handle = self._vbar.alloc(nbytes)
        vbar_slice = AimdoSlice(handle, handle[1] - self._vbar.base_addr, nbytes)
        self._offset = vbar_slice.offset + nbytes
        return vbar_slice

    def _is_above_limit(self, vbar_slice: AimdoSlice) -> bool:
        return self.limit is not None and vbar_slice.offset + vbar_slice.nbytes > self.limit

    def fault(self, vbar_slice: AimdoSlice | None) -> Any | None:
        if vbar_slice is None or self.failure is not None or self._is_above_limit(vbar_slice):
            return None
        with lock:
            if not self._is_under_cap(vbar_slice):
                return None
            signature = self._retry_once(self._api.vbar_fault, vbar_slice.handle)
        if signature is not None:
            self._granted[vbar_slice.offset] = vbar_slice.nbytes
        return signature

    def _is_under_cap(self, vbar_slice: AimdoSlice) -> bool:
        """Say whether the pages that a fault would map fit under the cap of all models together."""
        if not cap.holds(self.device):
            return True
        pages = self._residency()[vbar_slice.offset // PAGE : -(-(vbar_slice.offset + vbar_slice.nbytes) // PAGE)]
        return cap.make_room(self, sum(not page & RESIDENT for page in pages) * PAGE)

    def _retry_once(self, call: Callable[..., Any], *arguments: Any) -> Any | None:
        """Return the call's result; None where the driver fails twice at it."""
        try:
            return self.backend.retry_once(call, *arguments)
        except DeviceError:
            raise
        except RuntimeError as error:
            self._fail(error)
            return None

    def _fail(self, error: RuntimeError) -> None:
        self.failure = str(error)
        self.ledger.decide(
            f"comfy-aimdo's VBAR failed twice ({error}): this model streams its weights until its next step and then "
            "uses a software VBAR. Load it again to go back to comfy-aimdo; other models are not affected.",
            level=logging.WARNING,
        )

    def same(self, signature: Any, other: Any | None) -> bool:
        return other is not None and bool(self._api.vbar_signature_compare(signature, other))

    def unpin(self, vbar_slice: AimdoSlice) -> None:
        with lock:
            try:
                self._api.vbar_unpin(vbar_slice.handle)
            except RuntimeError as error:
                self._fail(error)  # not tried again: the pin is gone, and the eviction above the watermark failed
            if self._is_above_limit(vbar_slice):  # which was lowered while the slice was lent
                self._keep_limit()

    def tensor(self, vbar_slice: AimdoSlice) -> torch.Tensor:
        with torch.inference_mode(False):  # threads that are not in inference mode write into it
            return self._to_tensor(vbar_slice.handle, self.device)

    def adopt(self, vbar_slice: AimdoSlice, other: Any, other_slice: AimdoSlice, signature: Any) -> Any | None:
        # A newer VBAR's pages take those of an older one from its top. So the caller begins with the highest slice.
        if not isinstance(other, AimdoVBAR) or other_slice.nbytes != vbar_slice.nbytes:
            return None
        there = other.fault(other_slice)
        if there is None:
            return None
        try:
            new = self.fault(vbar_slice) if other.same(there, signature) else None
            if new is not None:
                try:
                    self.backend.copy(self.tensor(vbar_slice), other.tensor(other_slice), None)
                finally:
                    self.unpin(vbar_slice)
            return new
        finally:
            other.unpin(other_slice)

    def drop_tensor(self, vbar_slice: AimdoSlice) -> None:
        pass  # its pages stay with the slice

    # Other models and other threads call the methods below at any time.

    def prioritize(self) -> None:
        with lock:
            if self._vbar is not None:
                self._granted.clear()  # what went between two uses was taken by others
                self._vbar.prioritize()
                self.rank = next(_ranks)

    def deprioritize(self) -> None:
        with lock:
            if self._vbar is not None:
                self._vbar.deprioritize()
                self.rank = -next(_ranks)

    def set_limit(self, nbytes: int | None) -> None:
        # Not kept as a watermark: `prioritize` resets watermarks, and comfy-aimdo 0.4.5 cannot set them.
        self.limit = None if nbytes is None else nbytes // PAGE * PAGE
        with lock:
            self._keep_limit()

    def _keep_limit(self) -> None:
        if self.limit is not None:
            idle = [state == RESIDENT for state in self._residency()[self.limit // PAGE :]]
            self.free_memory(sum(idle) * PAGE)

    def free_memory(self, nbytes: int) -> int:
        with lock:
            if self._vbar is None or nbytes <= 0:
                return 0
            self._granted.clear()  # and what goes now was not taken by a computation
            with self.backend.current():
                self.backend.settle()  # as in `_free`
                return int(self._retry_once(self._vbar.free_memory, int(nbytes)) or 0)

    def loaded_size(self) -> int:
        with lock:
            now = int(self._vbar.loaded_size()) if self._vbar is not None else 0
            self._peak = max(self._peak, now)
        return now

    def within_reach(self) -> int:
        free, _ = self.backend.memory()
        with lock:  # comfy-aimdo counts the pages of all VBARs of the device, ComfyUI's too
            held = int(self._api.vbars_analyze(self.backend.aimdo_device))
            above = [vbar for vbar in _open if vbar.device == self.device and vbar.rank > self.rank]
            return held + free - sum(vbar.loaded_size() for vbar in above)

    def claim(self, nbytes: int, to_come: int = 0) -> None:
        cap.make_room(self, to_come)  # of the device's memory, comfy-aimdo makes room for each allocation

    def gave_way(self) -> int:
        granted, self._granted = self._granted, {}  # comfy-aimdo says nothing of an eviction
        pages = self._residency()
        return sum(nbytes for offset, nbytes in granted.items() if not _all_there(pages, offset, nbytes))

    def peak_size(self) -> int:
        self.loaded_size()
        return self._peak

    def resident(self, vbar_slice: AimdoSlice | None) -> bool:
        if vbar_slice is None:
            return False
        return _all_there(self._residency(), vbar_slice.offset, vbar_slice.nbytes)

    def _residency(self) -> list[int]:
        """Return the state of every page: 0 or RESIDENT, with another bit set while the page is pinned."""
        with lock:
            return self._vbar.get_residency() if self._vbar is not None else [0] * (self.capacity // PAGE)

    def close(self) -> None:
        with lock:
            self._vbar = None
            _open.discard(self)
            cap.closed(self)
            self._free()


def _all_there(pages: Sequence[int], offset: int, nbytes: int) -> bool:
    return all(pages[page] & RESIDENT for page in range(offset // PAGE, (offset + max(1, nbytes) - 1) // PAGE + 1))


def _free(vbar: Any, backend: Backend) -> None:
    with lock, backend.current():
        # Any thread may drop the last reference. Without this wait pages would go from under kernels that read them.
        backend.settle()
        getattr(vbar, "close", vbar.__del__)()  # `close` is new in 0.6.0
