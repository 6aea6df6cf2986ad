"""Take turns, so that a machine that is slow for a while is slow for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """Begin elsewhere each turn, so that no item always follows the same neighbour."""
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def seconds_in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Time each call in each round; return its seconds by name."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in rotated(list(calls), turn):
            call = calls[name]
            synchronise(device)
            began = time.perf_counter()
            call()
            synchronise(device)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def synchronise(device: torch.device | None) -> None:
    """Wait for the device, so that the clock sees the work and not its queueing."""
    if device is not None and device.type != "cpu":
        import torch  # here, as a contestant may have to do something before torch is imported

        torch.get_device_module(device).synchronize(device)
