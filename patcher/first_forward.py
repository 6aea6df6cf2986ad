"""Stands in for the caster until the first forward, then prepares the model and hands over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..ops.ledger import Ledger
from ..ops.lending.bundle import Bundle, Lending


class FirstForward:
    """Prepares the model at its first loan.

    prepare: a bound method that makes every bundle's lender the caster. Held weakly, as the model holds this object.
    """

    def __init__(self, prepare: Callable[[], object], ledger: Ledger) -> None:
        self._prepare = weakref.WeakMethod(prepare)
        self.ledger = ledger

    def __deepcopy__(self, memo: dict) -> None:
        """Leave the lender out of copies. A copy of a dynamic module is an ordinary one."""

    def enter(self, bundle: Bundle) -> Lending:
        """Prepare the model and lend through its caster. Raises RuntimeError where the model was dropped."""
        self._prepare_for(bundle)
        return bundle.lender.enter(bundle)

    def read(self, bundle: Bundle) -> AbstractContextManager[Sequence[torch.Tensor]]:
        """Do the same for an operation outside of the module's forward."""
        self._prepare_for(bundle)
        return bundle.lender.read(bundle)

    def at_hand(self, bundle: Bundle) -> Lending:
        """Prepare the model, so that its caster is at hand."""
        self._prepare_for(bundle)
        return bundle.lender.at_hand(bundle)

    def rows(self, table: Bundle, idle: Any, asked: Any) -> AbstractContextManager[Any]:
        """Do the same for an operation that looks rows up."""
        self._prepare_for(table)
        return table.lender.rows(table, idle, asked)

    def _prepare_for(self, bundle: Bundle) -> None:
        prepare = self._prepare()
        if prepare is None:
            raise RuntimeError(f"the dynamic model of '{bundle.name}' was dropped while its module is still in use.")
        prepare()
