"""What the pack's classes of quantised weights share of torch's protocol for subclasses."""

from __future__ import annotations

from typing import Any

import torch


def linear_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the arguments of `torch.nn.functional.linear`, however they were given."""
    return x, weight, bias


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers beside those of a dtype are kept: bf16 has all those of fp8."""
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of a model's dtype are merged and quantised: none of fp8, which would round."""
    return dtype if dtype.itemsize > 1 else torch.float32


def empty_branch(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrices of a low-rank branch, down and up, without memory. dtype: the weight's.

    A model in fp8 computes in 16 bit. Its branch would lose most of a LoRA in fp8, which has no numbers below 0.002.
    """
    rows, columns = shape
    options: dict[str, Any] = {"dtype": wide(dtype), "device": "meta"}
    return torch.empty(rank, columns, **options), torch.empty(rows, rank, **options)


def add_branch(
    result: torch.Tensor, x: torch.Tensor, down: torch.Tensor | None, up: torch.Tensor | None
) -> torch.Tensor:
    """Add to a product of x the one of a weight's low-rank branch, if it has one, in x's dtype."""
    if down is None:
        return result
    assert up is not None
    narrow = torch.nn.functional.linear(x, down.to(x.dtype))
    result.view(-1, up.shape[0]).addmm_(narrow.view(-1, up.shape[1]), up.to(x.dtype).t())  # no second result in memory
    return result


def writes_into(cls: type, func: Any, args: Any) -> bool:
    """Say whether an operation would write into a tensor of the class."""
    return func._schema.is_mutable and any(
        isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write
        for argument, value in zip(func._schema.arguments, args, strict=False)
    )
