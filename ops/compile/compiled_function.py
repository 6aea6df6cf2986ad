"""Blocks compiled with their weights lifted out: one function for all blocks of a signature, given the lent tensors.

Residency, patches and their strength never reach a guard, since a function is traced over a skeleton that owns nothing
and every tensor of a block is an argument. Before a call that may compile, the arguments are copied. So a block that
began and failed runs again, uncompiled, on the arguments that it was given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from ..device.out_of_memory import is_out_of_memory
from ..errors import SpillwayError
from ..gather import is_wrapper
from ..ledger import first_line
from .skeleton import skeleton

# Described inputs that a function remembers. A schedule of floats would otherwise fill memory.
REMEMBERED = 512


@dataclasses.dataclass(frozen=True)
class CompileSettings:
    """Arguments of torch.compile. dynamic None: torch finds out which sizes change.

    tracing: what is entered while torch may trace.
    """

    backend: str = "inductor"
    mode: str = "default"
    fullgraph: bool = False
    dynamic: bool | None = True
    cache_size_limit: int = 640
    tracing: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def compile_count() -> int:
    """Return the number of graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def graph_breaks() -> set[str]:
    """Return the reasons why torch has split functions into several graphs in this process."""
    from torch._dynamo.utils import counters

    return set(counters["graph_break"])


@contextlib.contextmanager
def compiler_settings(limit: int) -> Iterator[None]:
    """Set the number of graphs that a function may have. Sizes that happen to be equal stay separate symbols."""
    import torch._dynamo
    import torch.fx.experimental._config as shapes

    dynamo = torch._dynamo.config
    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    total = f"accumulated_{name}"
    with (
        dynamo.patch({name: limit, total: max(limit, getattr(dynamo, total))}),  # type: ignore[attr-defined]
        shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
    ):
        yield


def describe(value: Any, tensors: list[torch.Tensor], depth: int = 0) -> Hashable:
    """Return all that torch could base a guard on, as a key. Appends the tensors in `value` to `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.dtype, value.device, tuple(value.shape), value.stride(), value.requires_grad
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if depth > 8 or isinstance(value, (type, torch.nn.Module)) or callable(value):
        return id(value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(describe(entry, tensors, depth + 1) for entry in value)
    if isinstance(value, dict):
        return dict, tuple((str(k), describe(v, tensors, depth + 1)) for k, v in value.items())
    return type(value), describe(getattr(value, "__dict__", {}), tensors, depth + 1)


def as_argument(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same memory as torch guards on it: of the present inference mode and of a fixed shape."""
    if type(tensor) is not torch.Tensor and not is_wrapper(tensor):
        tensor = tensor.detach()
    tensor = _of_this_mode(tensor, torch.is_inference_mode_enabled())
    if not hasattr(tensor, "_dynamo_static_indices"):
        torch._dynamo.mark_static(tensor)
    return tensor


def _of_this_mode(tensor: torch.Tensor, inference: bool) -> torch.Tensor:
    """Return a tensor of the same memory, and in a wrapper its parts, that are of inference mode or not.

    A weight that lies in its file is not, and one that was patched in an inference run is: each would be a graph.
    """
    if is_wrapper(tensor):
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(tensor, name) for name in names}
        wanted = {name: _of_this_mode(part, inference) for name, part in parts.items()}
        if all(wanted[name] is parts[name] for name in names):
            return tensor
        return type(tensor).__tensor_unflatten__(wanted, context, tensor.shape, None)  # type: ignore[attr-defined, no-any-return]
    if tensor.is_inference() == inference:
        return tensor
    shape, stride = tensor.shape, tensor.stride()
    argument = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return argument.set_(tensor.untyped_storage(), tensor.storage_offset(), shape, stride)  # type: ignore[call-overload]


class Failed(SpillwayError, Exception):
    """A block could not be compiled; its arguments are as they were."""


class CompiledFunction:
    """One function for all blocks of one signature."""

    def __init__(self, block: torch.nn.Module, settings: CompileSettings) -> None:
        self.name = type(block).__name__
        self.settings = settings
        self.failed: str | None = None
        self.graphs = 0
        self.shapes: list[tuple[int, ...]] = []  # of the tensors that the last call was given
        body = skeleton(block)
        # Described inputs that have run -> the indices of the tensors that the block wrote into.
        self._seen: dict[Hashable, list[int]] = {}

        def run(names: list[str], tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, tensors, strict=True))
            return torch.func.functional_call(body, given, args, kwargs, tie_weights=False)

        # torch keeps and limits its graphs by code object, so each function has a code object of its own.
        code = run.__code__.replace(co_name=f"spillway_{self.name}")
        own = types.FunctionType(code, run.__globals__, code.co_name, run.__defaults__, run.__closure__)
        mode = settings.mode if settings.mode != "default" and settings.backend == "inductor" else None
        self._run = torch.compile(
            own, backend=settings.backend, mode=mode, fullgraph=settings.fullgraph, dynamic=settings.dynamic
        )

    def __call__(
        self,
        names: list[str],
        tensors: list[torch.Tensor],
        args: tuple,
        kwargs: dict[str, Any],
        make_room: Callable[[BaseException, bool], bool],
        note: Callable[[CompiledFunction, int, float], None],
        passes: tuple[type[BaseException], ...],
    ) -> Any:
        """Run a block. Raises Failed with `args` as they were, else the error of the block."""
        given: list[torch.Tensor] = []
        key = (describe((args, kwargs), given), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        written = self._seen.get(key)
        at_risk = range(len(given)) if written is None else written
        kept = [given[index].clone() for index in at_risk]

        def put_back() -> None:
            for index, copy in zip(at_risk, kept, strict=True):
                given[index].copy_(copy)

        def as_given() -> bool:
            """Say whether the arguments are as given. Only tensors are put back, not an entry taken out of a list."""
            now: list[torch.Tensor] = []
            same = describe((args, kwargs), now) == key[0]
            return same and all(one is other for one, other in zip(now, given, strict=True))

        before, broken, start = compile_count(), graph_breaks(), time.perf_counter()
        try:
            try:
                result = self._call(written is None, names, tensors, args, kwargs)
            except Exception as error:
                put_back()
                if isinstance(error, passes) or not make_room(error, as_given()):
                    raise
                result = self._call(written is None, names, tensors, args, kwargs)
        except Exception as error:
            put_back()
            if isinstance(error, passes) or is_out_of_memory(error) or not as_given():
                raise
            raise Failed(reason_of(error)) from error
        finally:
            graphs = compile_count() - before
            if graphs:
                self.graphs += graphs
                self.shapes = [tuple(tensor.shape) for tensor in given]
                note(self, graphs, time.perf_counter() - start)
        if written is None:
            if len(self._seen) >= REMEMBERED:
                self._seen.clear()
            self._seen[key] = [
                index for index, copy in zip(at_risk, kept, strict=True) if not torch.equal(given[index], copy)
            ]
            self._check_pieces(tensors, graph_breaks() - broken)
        return result

    def _check_pieces(self, tensors: list[torch.Tensor], broken: set[str]) -> None:
        """Give up where a quantised weight broke the graph, as it would in every layer and at every other size."""
        packages = {type(tensor).__module__.partition(".")[0] for tensor in tensors if is_wrapper(tensor)}
        for package in packages - {"torch"}:
            if any(package in text for text in broken):
                self.failed = f"its quantised weights ({package}) cannot be traced in one piece"

    def _call(
        self, may_compile: bool, names: list[str], tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        if not may_compile:
            return self._run(names, tensors, args, kwargs)
        with compiler_settings(self.settings.cache_size_limit), self.settings.tracing():
            return self._run(names, tensors, args, kwargs)


def reason_of(error: BaseException) -> str:
    """Return the first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else 'no message'}"
