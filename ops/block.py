"""A block that is lent as a whole: one bundle for all of its modules, one transfer, one loan around its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .layer import is_out_of_memory
from .repeat import may_repeat

if TYPE_CHECKING:
    from .bundle import Bundle
    from .caster import Caster

# Gets the plain forward, its arguments and the caster, while the block is lent.
Compute = Callable[[Callable[..., Any], "Caster", tuple, dict[str, Any]], Any]


class Block:
    """How the modules of one block run.

    members: the modules inside that have parameters. One that is called while its block is not running borrows the
    block by itself. compute: runs the block in place of its forward (compiled), None for the forward.
    """

    def __init__(self, bundle: Bundle, members: list[torch.nn.Module]) -> None:
        self.bundle = bundle
        self.members = members
        self.compute: Compute | None = None

    def forward(self, module: torch.nn.Module, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        bundle = self.bundle
        caster: Any = bundle.module.spillway_caster
        if bundle.depth:
            return self._part(module, caster, plain, args, kwargs)
        caster.enter(bundle)
        try:
            if module is bundle.module and self.compute is not None:
                return self.compute(plain, caster, args, kwargs)
            if module is not bundle.module:
                caster = bundle.module.spillway_caster  # the one that stands there once the model is prepared
                caster.ledger.decide_once(
                    f"parts of '{bundle.name}' are called from outside of it, and each call brings all of it: this "
                    "model runs faster without compiling."
                )
            return self._part(module, caster, plain, args, kwargs)
        finally:
            caster.exit(bundle)

    def _part(
        self, module: torch.nn.Module, caster: Caster, plain: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        try:
            return plain(*args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error) or not caster.make_room(self.bundle, error, again=may_repeat(module)):
                raise
        return plain(*args, **kwargs)
