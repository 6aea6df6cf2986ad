"""Blocks compiled with their weights lifted out: one function for all blocks of a shape, given the lent tensors.

Residency, patches and their strength never reach a guard: a function is traced over a skeleton that owns nothing, and
every tensor of a block is an argument. What could fail is made harmless: before a call that may compile, the arguments
are copied, so that a block that began and failed is run again, uncompiled, on what it was given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from .block import Block
from .caster import Caster
from .gather import is_wrapper
from .layer import is_out_of_memory
from .ledger import Ledger
from .skeleton import Untraceable, lifted, signature, skeleton

# (block, arguments, keywords) -> the arguments without what the result does not depend on; a str says why the block
# cannot be compiled this time.
Prepare = Callable[[torch.nn.Module, tuple, dict[str, Any]], "tuple[tuple, dict[str, Any]] | str"]
# Described inputs that one function remembers; a schedule of floats would otherwise fill memory.
REMEMBERED = 512


@dataclasses.dataclass(frozen=True)
class CompileSettings:
    """What torch.compile is told. dynamic None: torch finds out which sizes change."""

    backend: str = "inductor"
    mode: str = "default"
    fullgraph: bool = False
    dynamic: bool | None = True
    cache_size_limit: int = 640


def compile_count() -> int:
    """Graphs that torch has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def graph_breaks() -> set[str]:
    """Why torch has compiled functions in pieces in this process."""
    from torch._dynamo.utils import counters

    return set(counters["graph_break"])


@contextlib.contextmanager
def compiler_settings(limit: int) -> Iterator[None]:
    """The number of graphs a function may have; and sizes that happen to be equal are not taken for one."""
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
    """What torch could base a guard on, as a key; the tensors in `value` are appended to `tensors`."""
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
    """The same memory as torch guards on it: as made in the present inference mode, and with a fixed shape."""
    if not is_wrapper(tensor):
        tensor = tensor.detach() if type(tensor) is not torch.Tensor else tensor
        if tensor.is_inference() != torch.is_inference_mode_enabled():
            shape, stride = tensor.shape, tensor.stride()
            made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            tensor = made.set_(tensor.untyped_storage(), tensor.storage_offset(), shape, stride)  # type: ignore[call-overload]
    if not hasattr(tensor, "_dynamo_static_indices"):
        torch._dynamo.mark_static(tensor)
    return tensor


class Failed(Exception):
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
        # Which of the described inputs has run, and which of its tensors the block wrote into.
        self._seen: dict[Hashable, list[int]] = {}

        def run(names: list[str], tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, tensors, strict=True))
            return torch.func.functional_call(body, given, args, kwargs, tie_weights=False)

        # torch keeps what it compiled by code object, and limits it by that: each function has its own.
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
        retry: Callable[[BaseException, bool], bool],
        note: Callable[[CompiledFunction, int, float], None],
        passes: tuple[type[BaseException], ...],
    ) -> Any:
        """Run a block. Raises Failed with `args` as they were, else what the block raised."""
        given: list[torch.Tensor] = []
        key = (describe((args, kwargs), given), torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        written = self._seen.get(key)
        at_risk = range(len(given)) if written is None else written
        kept = [given[index].clone() for index in at_risk]

        def put_back() -> None:
            for index, copy in zip(at_risk, kept, strict=True):
                given[index].copy_(copy)

        def as_given() -> bool:
            """Only tensors are copied: a block that took an entry out of a list cannot be run again."""
            now: list[torch.Tensor] = []
            same = describe((args, kwargs), now) == key[0]
            return same and all(one is other for one, other in zip(now, given, strict=True))

        before, broken, start = compile_count(), graph_breaks(), time.perf_counter()
        try:
            try:
                result = self._call(written is None, names, tensors, args, kwargs)
            except Exception as error:
                put_back()
                if isinstance(error, passes) or not is_out_of_memory(error) or not retry(error, as_given()):
                    raise
                result = self._call(written is None, names, tensors, args, kwargs)
        except Exception as error:
            put_back()
            if isinstance(error, passes) or is_out_of_memory(error) or not as_given():
                raise
            raise Failed(reason_of(error)) from error
        finally:
            made = compile_count() - before
            if made:
                self.graphs += made
                self.shapes = [tuple(tensor.shape) for tensor in given]
                note(self, made, time.perf_counter() - start)
        if written is None:
            if len(self._seen) >= REMEMBERED:
                self._seen.clear()
            self._seen[key] = [
                index for index, copy in zip(at_risk, kept, strict=True) if not torch.equal(given[index], copy)
            ]
            self._check_pieces(tensors, graph_breaks() - broken)
        return result

    def _check_pieces(self, tensors: list[torch.Tensor], broken: set[str]) -> None:
        """A quantised weight that broke the graph would break it in every layer, and at every other size again."""
        packages = {type(tensor).__module__.partition(".")[0] for tensor in tensors if is_wrapper(tensor)}
        for package in packages - {"torch"}:
            if any(package in text for text in broken):
                self.failed = f"its quantised weights ({package}) cannot be traced in one piece"

    def _call(
        self, may_compile: bool, names: list[str], tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        with compiler_settings(self.settings.cache_size_limit) if may_compile else contextlib.nullcontext():
            return self._run(names, tensors, args, kwargs)


def reason_of(error: BaseException) -> str:
    """The first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


# Functions of all models that are alive, by settings and signature.
_functions: weakref.WeakValueDictionary[Hashable, CompiledFunction] = weakref.WeakValueDictionary()
# The last ones outlive their models: a model that is loaded again is compiled already.
_recent: deque[CompiledFunction] = deque(maxlen=32)


class BlockCompiler:
    """Compiles the blocks of one dynamic model as they are first used. Blocks of equal signature share a function.

    who: how failures are introduced. prepare: see Prepare. passes: exceptions that are no failures (an interrupt).
    """

    def __init__(
        self,
        settings: CompileSettings,
        ledger: Ledger,
        *,
        who: str = "torch.compile",
        log_compile: bool = True,
        prepare: Prepare | None = None,
        passes: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.settings, self.ledger, self.who, self.log_compile = settings, ledger, who, log_compile
        self.prepare, self.passes = prepare, passes
        self.generation = 0
        self._functions: dict[Block, tuple[Hashable, CompiledFunction | None, list[tuple[dict, str, str]]]] = {}

    def attach(self, blocks: list[Block]) -> None:
        """These blocks run compiled from now on."""
        for block in blocks:
            block.compute = _Compute(self, block)

    def refresh(self) -> None:
        """Attributes of modules may have changed: signatures are read again."""
        self.generation += 1

    def run(self, block: Block, plain: Callable[..., Any], caster: Caster, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block's forward, compiled where that can be; while it is lent."""
        function, places = self._function(block)
        if function is None or function.failed is not None:
            return plain(*args, **kwargs)
        module = block.bundle.module
        prepared = self.prepare(module, args, kwargs) if self.prepare is not None else (args, kwargs)
        if isinstance(prepared, str):
            self.ledger.decide_once(f"{function.name} runs uncompiled: {prepared}.", level=logging.INFO)
            return plain(*args, **kwargs)
        tensors = [as_argument(store[attr]) for store, attr, _ in places]
        names = [name for _, _, name in places]

        def retry(error: BaseException, again: bool) -> bool:
            return caster.make_room(block.bundle, error, again)

        try:
            result = function(names, tensors, *prepared, retry, self._note, self.passes)
            if function.failed is not None:
                self._say_failed(function.name, function.failed)
            return result
        except Failed as failure:
            function.failed = str(failure)
        self._say_failed(function.name, function.failed)
        return plain(*args, **kwargs)

    def _function(self, block: Block) -> tuple[CompiledFunction | None, list[tuple[dict, str, str]]]:
        state = (self.generation, block.bundle.version)
        known = self._functions.get(block)
        if known is not None and known[0] == state:
            return known[1], known[2]
        module = block.bundle.module
        function, places = None, lifted(module)
        try:
            key = (self.settings, signature(module))
            function = _functions.get(key)
            if function is None:
                function = _functions[key] = CompiledFunction(module, self.settings)
                _recent.append(function)
            if function.failed is not None:
                self._say_failed(function.name, function.failed)
        except Untraceable as reason:
            self.ledger.decide_once(f"{block.bundle.name} runs uncompiled: {reason}.", level=logging.INFO)
        except Exception as error:
            self._say_failed(type(module).__name__, reason_of(error))
        self._functions[block] = state, function, places
        return function, places

    def _say_failed(self, name: str, reason: str) -> None:
        self.ledger.decide_once(f"{self.who}: compile failed; running uncompiled. {name}: {reason}")

    def _note(self, function: CompiledFunction, graphs: int, seconds: float) -> None:
        counters = self.ledger.counters
        counters.graphs_compiled += graphs
        counters.compile_seconds += seconds
        if self.log_compile:
            shapes = ", ".join("x".join(map(str, shape)) for shape in function.shapes)
            self.ledger.decide(
                f"compiled {function.name} for {shapes}: {graphs} graph{'s' * (graphs != 1)} in {seconds:.1f} s, "
                f"{function.graphs} in all"
            )


class _Compute:
    def __init__(self, compiler: BlockCompiler, block: Block) -> None:
        self.compiler, self.block = compiler, block

    def __call__(self, plain: Callable[..., Any], caster: Caster, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.compiler.run(self.block, plain, caster, args, kwargs)
