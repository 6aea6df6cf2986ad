"""The one place that says what all models together may hold on a device. Both kinds of VBAR mind it.

A cap counts weights, and what brings them. The computation comes on top.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .. import ledger
from .protocol import lock

_caps: dict[torch.device, int] = {}
# The open VBARs of all devices. Weak: a model that is dropped without being closed takes its memory with it.
_open: weakref.WeakSet[Any] = weakref.WeakSet()


def set_cap(device: torch.device, nbytes: int | None) -> None:
    """Set the bytes that all models together may hold on a device; None for no cap.

    Weights above it go when the next model is used, or the next step begins.
    """
    with lock:
        if nbytes is None:
            _caps.pop(device, None)
        elif nbytes < 0:
            raise ValueError(f"the cap of {device} is {nbytes} bytes; expected 0 or more, or None.")
        else:
            _caps[device] = nbytes


def cap_of(device: torch.device) -> int | None:
    """Return the cap of a device in bytes; None where there is none."""
    return _caps.get(device)


def holds(device: torch.device) -> bool:
    """Say whether a device has a cap."""
    return device in _caps


def in_words(device: torch.device) -> str:
    """Word the cap of a device, with a comma before it. Empty where there is none."""
    cap = cap_of(device)
    return "" if cap is None else f", {ledger.in_words(cap)} for all models together"


def opened(vbar: Any) -> None:
    """Count a VBAR from now on."""
    with lock:
        _open.add(vbar)


def closed(vbar: Any) -> None:
    """Count a VBAR no more."""
    with lock:
        _open.discard(vbar)


def _others(vbar: Any) -> list[Any]:
    """List the other VBARs of its device, the one that gives way first before all others."""
    device = vbar.backend.device
    return sorted((one for one in _open if one is not vbar and one.backend.device == device), key=lambda one: one.rank)


def reach(vbar: Any) -> int | None:
    """Return the bytes that a VBAR may hold under the cap, once those of lower rank have given way; None for no cap."""
    cap = cap_of(vbar.backend.device)
    if cap is None:
        return None
    with lock:
        return max(0, cap - sum(one.loaded_size() for one in _others(vbar) if one.rank > vbar.rank))


def make_room(vbar: Any, nbytes: int) -> bool:
    """Let VBARs of lower rank give way until `nbytes` more fit under the cap. Say whether they do."""
    cap = cap_of(vbar.backend.device)
    if cap is None:
        return True
    with lock:
        others = _others(vbar)
        over = nbytes + vbar.loaded_size() + sum(one.loaded_size() for one in others) - cap
        for one in others:
            if over <= 0 or one.rank > vbar.rank:
                break
            over -= one.free_memory(over)
        return over <= 0
