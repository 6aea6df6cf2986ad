"""Checks a device before its first model is prepared, once for its driver and versions."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ...ops.device.backend import Backend
from ...ops.device.out_of_memory import is_out_of_memory
from ...ops.int8.linear import kernel_name
from ...ops.ledger import Ledger, first_line
from ...ops.never_raises import never_raises
from ...ops.vbar.aimdo import PAGE, AimdoVBAR, serves
from . import record
from .bytes import Wrong
from .products import check_fp8, check_int8
from .slices import bytes_needed, check_slices
from .transfers import check_copies, check_pinned, check_streams, pageable
from .verdict import COPIES, FP8, INT8, PINNED, STREAMS, VBAR, Verdict

log = logging.getLogger("spillway")

# What is known in this process, by device and check. One thread checks at a time.
_known: dict[str, record.Found] = {}
# Checks that could not run, by device and check, and why. They wait so long for another try. Else each model on a full
# device would try.
_refused: dict[str, dict[str, str]] = {}
_tried: dict[str, float] = {}  # when a device's checks last ran, by time.monotonic()
RETRY_SECONDS = 60.0
_lock = threading.RLock()


@never_raises("checking a device before its first use", lambda *_, **__: Verdict())
def first_use(backend: Backend, path: Path | None = None, *, aimdo: bool = True, may_init: bool = False) -> Verdict:
    """Return what is known to be wrong on a device. The first call for it finds that out, in less than a second.

    path: the JSON file that keeps it from one process to the next. aimdo: check comfy-aimdo's VBAR too. may_init:
    initialise comfy-aimdo for that where nobody has.
    """
    name = backend.identity()
    if name is None:
        return Verdict()
    with _lock:
        found = _known.setdefault(name, record.read(path, name))
        waits = time.monotonic() - _tried.get(name, -RETRY_SECONDS) < RETRY_SECONDS
        verdict = check(backend, {**found}, aimdo=aimdo, may_init=may_init, waits=waits)
        if not waits:
            _tried[name] = time.monotonic()
        fresh = {label: words for label, words in _found(backend, verdict).items() if label not in found}
        if fresh:
            words = f"checked in {verdict.seconds:.2f} s, {len(verdict.failed)} of {len(found | fresh)} checks failed"
            log.info("[Spillway] %s: %s", name, words)
            _remember(name, path, fresh)
    return verdict


def remember_failures(backend: Backend, path: Path | None, verdict: Verdict) -> None:
    """Add what failed this time to what is known. What failed before stays so: a fault may come and go."""
    name = backend.identity()
    failed: record.Found = {label: words for label, words in _found(backend, verdict).items() if words is not None}
    if name is not None and failed:
        with _lock:
            _known.setdefault(name, record.read(path, name))
            _remember(name, path, failed)


def _remember(name: str, path: Path | None, found: record.Found) -> None:
    _known[name].update(found)
    try:
        record.write(path, name, found)
    except OSError as error:
        log.warning("[Spillway] %s cannot be written (%s): devices are checked at each start.", path, error)


def check(
    backend: Backend,
    found: record.Found | None = None,
    *,
    aimdo: bool = True,
    may_init: bool = False,
    waits: bool = False,
) -> Verdict:
    """Run the checks of which `found` says nothing. Return what they and `found` say. waits: run none that refused."""
    verdict = Verdict(backend.identity() or str(backend.device))
    began = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad(), backend.current():
        for name, run in _checks(backend, verdict, aimdo, may_init).items():
            label = _label(backend, name)
            if found is not None and label in found:
                words = found[label]
            elif waits and label in _refused.get(verdict.device, {}):
                verdict.not_run[name] = _refused[verdict.device][label]
                continue
            else:
                try:
                    run()
                    words = None
                except Wrong as error:
                    words = str(error)
                # A device that refuses is met where it is used. Next time it may not refuse.
                except Exception as error:
                    verdict.not_run[name] = first_line(error)
                    _refused.setdefault(verdict.device, {})[label] = first_line(error)
                    continue
            if words is None:
                verdict.passed.append(name)
            else:
                verdict.failed[name] = words
    verdict.seconds = time.perf_counter() - began
    return verdict


def _checks(backend: Backend, verdict: Verdict, aimdo: bool, may_init: bool) -> dict[str, Callable[[], None]]:
    """Give the checks in their order. Each uses only what those before it let through."""

    def host_empty(nbytes: int) -> torch.Tensor:
        return backend.host_empty(nbytes) if PINNED in verdict.passed else pageable(nbytes)

    def slices() -> None:
        stream = backend.stream() if STREAMS in verdict.passed else None
        vbar = AimdoVBAR(backend, bytes_needed(PAGE) + PAGE, Ledger("the check of a device"))
        try:
            check_slices(backend, vbar, PAGE, host_empty, stream)
        finally:
            backend.synchronize()
            vbar.close()

    def int8() -> None:
        try:
            check_int8(backend.device)
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise
            raise Wrong(f"INT8 products: {first_line(error)}") from error  # else each layer would raise it

    checks: dict[str, Callable[[], None]] = {
        COPIES: lambda: check_copies(backend),
        PINNED: lambda: check_pinned(backend),
    }
    if backend.streams:
        checks[STREAMS] = lambda: check_streams(backend, host_empty)
    if aimdo and serves(backend, may_init)[0]:
        checks[VBAR] = slices
    checks[INT8] = int8
    checks[FP8] = lambda: check_fp8(backend.device)
    return checks


def _label(backend: Backend, check: str) -> str:
    """Name a check in the record. Another kernel for INT8 is another check."""
    return f"{check} by {kernel_name(backend.device.type)}" if check == INT8 else check


def _found(backend: Backend, verdict: Verdict) -> record.Found:
    return {_label(backend, name): verdict.failed.get(name) for name in (*verdict.passed, *verdict.failed)}
