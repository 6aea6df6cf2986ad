"""A backend for a device that may fail: it synchronises, tries once more, and then asks less of the device.

Where streams, events or copies fail for good, transfers are synchronous from then on. Where memory cannot be
page-locked any more, host memory is pageable. Both are slower and as right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..ledger import Ledger, first_line
from .backend import Backend, DeviceError, T
from .readers import Readers


class Moment:
    """An event that can be waited for as long as the device can be synchronised."""

    __slots__ = ("backend", "event")

    def __init__(self, backend: CarefulBackend, event: Any) -> None:
        self.backend, self.event = backend, event

    def synchronize(self) -> None:
        self.backend.order(self.event.synchronize)

    def query(self) -> bool:
        return self.backend.order(self.event.query) is not False


class CarefulBackend(Backend):
    """Wraps a backend for one model.

    synchronous: every transfer is waited for. pageable: no host memory is locked any more.
    """

    def __init__(self, unwrapped: Backend, ledger: Ledger) -> None:
        super().__init__(unwrapped.device)
        self.unwrapped, self.ledger = unwrapped, ledger
        self.in_place, self.streams, self.aimdo_device = unwrapped.in_place, unwrapped.streams, unwrapped.aimdo_device
        self.reserved = unwrapped.reserved
        self.synchronous = self.pageable = False
        self._unsettled = False  # a synchronisation failed, so no transfer is known to be done

    def _retry_once(self, call: Callable[..., T], *arguments: Any) -> T:
        return self.retry_once(call, *arguments, then=self._note)

    def _note(self, error: Exception) -> None:
        self.ledger.decide_once(f"the device failed once ({first_line(error)}): synchronised, and tried again.")

    def order(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call that only puts work in order. Where it fails for good, synchronise instead and return None."""
        if self.synchronous:
            return None
        try:
            return self._retry_once(call, *arguments)
        except RuntimeError as error:
            self._step_down(error)
            return None

    def _step_down(self, error: RuntimeError) -> None:
        self.synchronize()
        self.synchronous = True
        self.ledger.decide(
            f"the device failed twice at an asynchronous transfer ({first_line(error)}): this model's transfers are "
            "synchronous from now on and take longer. Load the model again to go back; other models are not affected.",
            level=logging.WARNING,
        )

    def identity(self) -> str | None:
        return self.unwrapped.identity()

    def empty(self, nbytes: int) -> torch.Tensor:
        # Out of memory is not tried again here: the caster makes room.
        return self.unwrapped.empty(nbytes)

    def lasting(self, nbytes: int) -> torch.Tensor:
        return self.unwrapped.lasting(nbytes)

    @torch.inference_mode(False)  # threads that are not in inference mode write into it
    def host_empty(self, nbytes: int) -> torch.Tensor:
        if not self.pageable:
            try:
                return self._retry_once(self.unwrapped.host_empty, nbytes)
            except DeviceError:
                raise
            except RuntimeError as error:
                self.pageable = True
                self.ledger.decide(
                    f"pinned memory refused ({first_line(error)}): using pageable memory from now on, which "
                    "transfers more slowly. A smaller pinned RAM budget avoids this.",
                    level=logging.WARNING,
                )
        return torch.empty(nbytes, dtype=torch.uint8)

    def stream(self) -> Any:
        return self.order(self.unwrapped.stream)

    def readers(self) -> Readers:
        return self.unwrapped.readers()

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        if self._unsettled:
            self.synchronize()
        if stream is not None and not self.synchronous:
            try:
                self._retry_once(self.unwrapped.copy, target, source, stream)
                return
            except RuntimeError as error:
                self._step_down(error)
        try:
            self._retry_once(self.unwrapped.copy, target, source, None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise DeviceError(
                f"device {self.device} cannot be copied to or from ({first_line(error)}), not even step by step. "
                "Restart the process; if this comes back, look for faults in the system's log."
            ) from error

    def record(self, stream: Any) -> Moment | None:
        event = self.order(self.unwrapped.record, stream)
        return None if event is None else Moment(self, event)

    def timer(self, stream: Any) -> Any:
        return self.order(self.unwrapped.timer, stream)

    def seconds_between(self, start: Any, end: Any) -> float:
        return self.unwrapped.seconds_between(start, end)

    def wait(self, event: Any, stream: Any) -> None:
        if event is not None:
            self.order(self.unwrapped.wait, event.event, stream)

    def synchronize(self) -> None:
        try:
            self.unwrapped.synchronize()
        except RuntimeError:
            self._unsettled = True
            try:
                self.unwrapped.synchronize()
            except RuntimeError as error:
                raise DeviceError(
                    f"device {self.device} cannot be synchronised ({first_line(error)}), so nothing on it can be "
                    "trusted. Restart the process; if this comes back, look for faults in the system's log."
                ) from error
        self._unsettled = False

    def current(self) -> AbstractContextManager[Any]:
        return self.unwrapped.current()

    def limit_in_words(self) -> str:
        return self.unwrapped.limit_in_words()

    def memory(self) -> tuple[int, int]:
        try:
            return self._retry_once(self.unwrapped.memory)
        except DeviceError:
            raise
        except RuntimeError as error:
            raise DeviceError(
                f"device {self.device} does not say how much memory is free ({first_line(error)}). "
                "Run again; if this comes back, restart the process and look for faults in the system's log."
            ) from error
