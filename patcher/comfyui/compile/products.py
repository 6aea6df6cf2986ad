"""Lets compiled blocks multiply by weights of comfy-kitchen's W4A8.

Its operations keep a matrix in a table of their own and divide the work by sizes. A trace cannot follow that, and would
leave a matrix without numbers in the table, with which whatever comes after it would be computed. A graph calls each as
one opaque op.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch

from ....ops.overrides import overridden

w4a8_int8: Any
try:
    from comfy_kitchen.tensor import w4a8_int8

    _linear, _dequantise = w4a8_int8.w4a8_int8_linear, w4a8_int8.dequantize_w4a8_int8_weight
except (ImportError, AttributeError):  # another comfy-kitchen, or none: ComfyUI goes on without it too
    w4a8_int8 = None


def _opaque_linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    s_rel: torch.Tensor,
    s_channel: torch.Tensor,
    codebook: Optional[torch.Tensor],  # noqa: UP045 - torch reads these annotations
    correction: Optional[torch.Tensor],  # noqa: UP045
    bias: Optional[torch.Tensor],  # noqa: UP045
    group_size: int,
    convrot_groupsize: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return _linear(  # type: ignore[no-any-return]
        x, qdata, s_rel, s_channel, codebook, correction, bias, group_size, convrot_groupsize, out_dtype
    )


def _opaque_numbers(
    qdata: torch.Tensor,
    s_rel: torch.Tensor,
    s_channel: torch.Tensor,
    codebook: Optional[torch.Tensor],  # noqa: UP045
    correction: Optional[torch.Tensor],  # noqa: UP045
    group_size: int,
    convrot_groupsize: int,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    return _dequantise(  # type: ignore[no-any-return]
        qdata, s_rel, s_channel, codebook, correction, group_size, convrot_groupsize, output_dtype
    )


def _product(x: torch.Tensor, qdata: torch.Tensor, *others: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], qdata.shape[0]), dtype=others[-1])


def _numbers(qdata: torch.Tensor, *others: Any) -> torch.Tensor:
    return qdata.new_empty((qdata.shape[0], 2 * qdata.shape[1]), dtype=others[-1])


# torch reads the annotations of the functions that it is given. Here they are strings, and it needs objects.
_ANNOTATIONS = {
    **dict.fromkeys(("x", "qdata", "s_rel", "s_channel"), torch.Tensor),
    **dict.fromkeys(("codebook", "correction", "bias"), Optional[torch.Tensor]),  # noqa: UP045
    **dict.fromkeys(("group_size", "convrot_groupsize"), int),
    **dict.fromkeys(("out_dtype", "output_dtype"), torch.dtype),
    "return": torch.Tensor,
}


def _op(name: str, function: Any, result: Any) -> Any:
    function.__annotations__ = {part: _ANNOTATIONS[part] for part in function.__annotations__}
    made = torch.library.custom_op(f"spillway::{name}", function, mutates_args=())
    made.register_fake(result)
    return made


_linear_op = _op("w4a8_linear", _opaque_linear, _product)
_numbers_op = _op("w4a8_numbers", _opaque_numbers, _numbers)


def _linear_as_op(
    replaced: Any,
    x: torch.Tensor,
    qdata: torch.Tensor,
    s_rel: torch.Tensor,
    s_channel: torch.Tensor,
    codebook: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    group_size: int = 16,
    convrot_groupsize: int = 256,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Any:
    return _linear_op(x, qdata, s_rel, s_channel, codebook, correction, bias, group_size, convrot_groupsize, out_dtype)


def _numbers_as_op(
    replaced: Any,
    qdata: torch.Tensor,
    s_rel: torch.Tensor,
    s_channel: torch.Tensor,
    codebook: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    group_size: int = 16,
    convrot_groupsize: int = 256,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Any:
    return _numbers_op(qdata, s_rel, s_channel, codebook, correction, group_size, convrot_groupsize, output_dtype)


@contextmanager
def traceable_products() -> Iterator[None]:
    """Inside, what this thread traces calls each of those operations as one op."""
    if w4a8_int8 is None:
        yield
        return
    with (
        overridden(w4a8_int8, "w4a8_int8_linear", by=_linear_as_op),
        overridden(w4a8_int8, "dequantize_w4a8_int8_weight", by=_numbers_as_op),
    ):
        yield
