"""Compiles the blocks of a model when they are first used, and runs them compiled while they are lent."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch

from ..ledger import Ledger
from ..lending.block import Block
from .compiled_function import CompiledFunction, CompileSettings, Failed, as_argument, reason_of
from .skeleton import Untraceable, lifted, signature

# (block, arguments, keywords) -> the arguments that the result depends on, or a str that says why the block cannot be
# compiled this time.
Prepare = Callable[[torch.nn.Module, tuple, dict[str, Any]], "tuple[tuple, dict[str, Any]] | str"]

# Functions of all models that are alive, by settings and signature.
_functions: weakref.WeakValueDictionary[Hashable, CompiledFunction] = weakref.WeakValueDictionary()
# The last functions outlive their models, so a model that is loaded again is compiled already.
_recent: deque[CompiledFunction] = deque(maxlen=32)


class BlockCompiler:
    """Compiles the blocks of one dynamic model as they are first used. Blocks of equal signature share a function.

    who: the name that failures are logged under. prepare: see Prepare. passes: exceptions that are no failures (an
    interrupt).
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
        """Let these blocks run compiled from now on."""
        for block in blocks:
            block.compute = partial(self.run, block)

    def refresh(self) -> None:
        """Read signatures again, since attributes of modules may have changed."""
        self.generation += 1

    def run(self, block: Block, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the block's forward, compiled where possible, while the block is lent."""
        function, places = self._function(block)
        if function is None or function.failed is not None:
            return forward(*args, **kwargs)
        module = block.module
        prepared = self.prepare(module, args, kwargs) if self.prepare is not None else (args, kwargs)
        if isinstance(prepared, str):
            self.ledger.decide_once(f"{function.name} runs uncompiled: {prepared}.", level=logging.INFO)
            return forward(*args, **kwargs)
        tensors = [as_argument(store[attr]) for store, attr, _ in places]
        names = [name for _, _, name in places]
        try:
            result = function(names, tensors, *prepared, block.make_room, self._note, self.passes)
            if function.failed is not None:
                self._say_failed(function.name, function.failed)
            return result
        except Failed as failure:
            function.failed = str(failure)
        self._say_failed(function.name, function.failed)
        return forward(*args, **kwargs)

    def _function(self, block: Block) -> tuple[CompiledFunction | None, list[tuple[dict, str, str]]]:
        state = (self.generation, block.version)
        known = self._functions.get(block)
        if known is not None and known[0] == state:
            return known[1], known[2]
        module = block.module
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
            self.ledger.decide_once(f"{block.name} runs uncompiled: {reason}.", level=logging.INFO)
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
