"""Tests a device with its own checks and a small model: does it give right bytes, at any residency?"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Linear  # ComfyUI's layers are for models; the engine knows none of them

from ..ops.device.backend import Backend
from ..ops.device.identity import pack_version
from ..ops.ledger import in_words
from .dynamic_model import DynamicModel
from .first_use.check import check, remember_failures
from .policy import Policy

# 64 MiB in fp32, two pages of comfy-aimdo; a quarter of that on a CPU, which is slower and has no pages
DEPTH, WIDTH, WIDTH_ON_CPU, TOKENS = 8, 512, 256, 16
STEPS = 3
PATCHED = tuple(f"layers.{index}.wide.weight" for index in range(0, DEPTH, 2))
SHARES = (1.0, 0.5, 0.0)


class _Layer(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = Linear(width, 4 * width)
        self.narrow = Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.remainder(self.narrow(torch.remainder(self.wide(x), 5) - 2), 7) - 3


class Stack(torch.nn.Module):
    """Multiplies small whole numbers, so that every sum is exact, and the bits are the same in whatever order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(_Layer(width) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _state(width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Stack(width).state_dict().items()}
    return {
        key: torch.randint(-2, 3, shape, generator=generator, dtype=torch.int8).float() for key, shape in shapes.items()
    }


def _module(state: dict[str, torch.Tensor]) -> Stack:
    with torch.device("meta"):
        module = Stack(state["layers.0.wide.weight"].shape[1])
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def self_test(
    backend: Backend, path: Path | None = None, *, may_init: bool = False, stop: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Check a device anew and run a small model at each share of its bytes. Return what was found, ready for JSON.

    path: the file of `first_use`, which is told of checks that fail. may_init: initialise comfy-aimdo where nobody has.
    stop: called between the parts; may raise to end the test. Raises DeviceError for a device that does not answer.
    """
    verdict = check(backend, may_init=may_init)
    remember_failures(backend, path, verdict)
    stop()
    found: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": str(backend.device),
        "identity": backend.identity() or f"{backend.device}, torch {torch.__version__}, Spillway {pack_version()}",
        "memory_bytes": backend.memory()[1],
        "check": {
            "nothing_to_check": backend.identity() is None,
            "passed": verdict.passed,
            "failed": verdict.failed,
            "not_run": verdict.not_run,
            "seconds": round(verdict.seconds, 3),
        },
        "model": [],
    }
    state = _state(WIDTH_ON_CPU if backend.in_place else WIDTH)
    x, *expected = _plain(backend, state)
    for vbar in ("auto", "software") if "comfy-aimdo" in verdict.passed else ("auto",):
        for share in SHARES:
            stop()
            found["model"].append(_run(backend, share, vbar, state, x, expected, may_init, path))
    found["ok"] = not verdict.failed and all(run["same_bits"] for run in found["model"])
    return found


def _plain(backend: Backend, state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Give the input, and the module's own outputs with its weights as they are and with some of them patched."""
    module = _module(state).to(backend.device)
    width = state["layers.0.wide.weight"].shape[1]
    x = torch.arange(TOKENS * width, device=backend.device).remainder(7).view(TOKENS, width).float() - 3
    with torch.no_grad():
        first = module(x).cpu()
        patched = {key: -tensor if key in PATCHED else tensor for key, tensor in state.items()}
        return [x, first, _module(patched).to(backend.device)(x).cpu()]


def _run(
    backend: Backend,
    share: float,
    vbar: Any,
    state: dict[str, torch.Tensor],
    x: torch.Tensor,
    expected: list[torch.Tensor],
    may_init: bool,
    path: Path | None,
) -> dict[str, Any]:
    model = DynamicModel(
        _module(state), None, name="self test", backend=backend, may_init=may_init, first_use_file=path
    )
    try:
        model.set_policy(Policy(vram_bytes=int(share * model.total_bytes) if share < 1 else None, vbar=vbar))
        same, seconds = True, []
        for wanted, patches in zip(expected, ({}, dict.fromkeys(PATCHED, torch.neg)), strict=True):
            model.set_patches(patches)
            for _ in range(STEPS):
                began = time.perf_counter()
                with torch.no_grad():
                    result = model(x).cpu()  # waits for the device
                seconds.append(time.perf_counter() - began)
                same = same and torch.equal(result, wanted)
        counters = model.ledger.counters
        return {
            "share": share,
            "same_bits": same,
            "vbar": model.vbar_kind,
            "total_bytes": model.total_bytes,
            "peak_resident_bytes": model.peak_resident_bytes,
            "streamed_bytes": counters.bytes_streamed,
            "step_s": round(min(seconds), 5),
            "decisions": list(model.ledger.decisions),
        }
    finally:
        model.close()


def in_lines(found: dict[str, Any]) -> str:
    """Word what was found for people."""
    check_ = found["check"]
    lines = [f"{found['identity']}: {'all is well' if found['ok'] else 'SOMETHING IS WRONG'}"]
    if check_["nothing_to_check"]:
        lines.append("It computes on host memory, so there is nothing to check but the model below.")
    else:
        lines.append(f"Checks in {check_['seconds']:.2f} s; passed: {', '.join(check_['passed']) or 'none'}")
    lines += [f"FAILED {name}: {words}" for name, words in check_["failed"].items()]
    lines += [f"not run: {name} ({words})" for name, words in check_["not_run"].items()]
    for run in found["model"]:
        bits = "the plain module's bits" if run["same_bits"] else "OTHER BITS THAN THE PLAIN MODULE"
        lines.append(
            f"model at {run['share']:.0%} of {in_words(run['total_bytes'])} ({run['vbar']} VBAR): {bits}, "
            f"{1e3 * run['step_s']:.1f} ms a step, {in_words(run['streamed_bytes'])} streamed"
        )
    return "\n".join(lines)
