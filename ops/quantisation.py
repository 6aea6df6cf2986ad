"""How a weight is quantised as it is brought: the form that it gets, and what that costs."""

from __future__ import annotations

from typing import Protocol

import torch


class Quantisation(Protocol):
    """A format for one weight. `template` gives a QuantisedForm."""

    @property
    def name(self) -> str:
        """Return what users call the format."""

    @property
    def bits(self) -> int:
        """Return the bits of a number, without its share of the scales."""

    def template(self, shape: torch.Size, dtype: torch.dtype, rank: int = 0) -> torch.Tensor:
        """Return a weight without memory that behaves like one in `dtype`. rank: of its branch; 0 for none."""

    def restored(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows of a weight, in fp32, as they are once they have been quantised."""


class QuantisedForm(Protocol):
    """A weight that was quantised as it was brought, a tensor of its own class.

    down, up: a low-rank branch in floating point, (rank, columns) and (rows, rank), which is added exactly.
    """

    down: torch.Tensor | None
    up: torch.Tensor | None

    @property
    def rank(self) -> int:
        """Return the rank of the branch; 0 where there is none."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def quantise_(self, weight: torch.Tensor) -> None:
        """Fill the weight's parts from one of the same shape, some rows at a time."""

    def quantising_bytes(self, source: torch.Tensor) -> int:
        """Return the most temporary memory that `quantise_` takes beside the source and its own parts."""

    def making_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the most temporary memory that an operation on the weight takes for its numbers in a dtype."""
