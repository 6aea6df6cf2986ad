"""A block: one bundle for all modules of a transformer block, so that it is brought in one transfer and lent once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .bundle import Bundle, Lending
from .param import Param
from .repeat import may_repeat

# Gets the original forward and its arguments while the block is lent; returns what the forward would.
Compute = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Block(Bundle):
    """members: the modules inside that have parameters. A member that is called while its block is not running borrows
    the whole block. compute: runs in place of the block's forward (compiled); None for the forward.
    """

    def __init__(
        self, name: str, module: torch.nn.Module, params: Sequence[Param], members: Sequence[torch.nn.Module]
    ) -> None:
        super().__init__(name, module, params)
        self.members = list(members)
        self.compute: Compute | None = None
        self._lending: Lending | None = None  # while the block is lent

    def borrowers(self) -> list[torch.nn.Module]:
        return [self.module, *self.members]

    def run(
        self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.depth:
            return self._run_part(module, forward, args, kwargs)
        self._lending = lending = self.lender.enter(self)
        try:
            if module is self.module and self.compute is not None:
                return self.compute(forward, args, kwargs)
            if module is not self.module:
                self.lender.ledger.decide_once(
                    f"parts of '{self.name}' are called from outside of it, and each call brings all of it: this "
                    "model runs faster without compiling."
                )
            return self._run_part(module, forward, args, kwargs)
        finally:
            self._lending = None
            lending.exit(self)

    def _run_part(
        self, module: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            if not self.make_room(error, may_repeat(module)):
                raise
        return forward(*args, **kwargs)

    def make_room(self, error: BaseException, again: bool) -> bool:
        """Do as `Lending.make_room` while the block is lent. Return False at any other time."""
        return self._lending is not None and self._lending.make_room(self, error, again)
