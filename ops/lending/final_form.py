"""Makes the form of a bundle's tensors that its op gets: cast, quantised, patched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..gather import copy_into, inner_tensors, is_wrapper
from ..gguf.weight import GgufWeight, numbers_of, stays_quantised
from ..ledger import Counters
from ..quantisation import QuantisedForm
from ..subclasses import exact
from .bundle import Bundle
from .param import Param


def make_final(
    bundle: Bundle, source: Sequence[torch.Tensor], views: list[torch.Tensor], counters: Counters, *, in_place: bool
) -> list[torch.Tensor]:
    """Cast `source` into `views`, which have the final form, and apply the patches there. Return the views.

    in_place: `source` may be the source itself, which no patch may write into.
    """
    for param, view, tensor in zip(bundle.params, views, source, strict=True):
        if param.quantisation is not None:
            _quantise(param, view, tensor, counters, in_place)  # type: ignore[arg-type]
        elif param.patch is None:
            copy_into(view, tensor)
        elif getattr(view, "down", None) is not None:
            for to, part in zip(inner_tensors(view), inner_tensors(tensor), strict=False):
                to.copy_(part)  # the branch comes after them
            _fill_branch(view, param.patch)  # type: ignore[arg-type]
            counters.patched += 1
        else:
            _patch_into(view, param, tensor, in_place)
            counters.patched += 1
    return views


def _patch_into(view: torch.Tensor, param: Param, tensor: torch.Tensor, in_place: bool) -> None:
    """Patch a weight into its memory. A patch gets it in the dtype that the op computes in, and may write into it."""
    assert param.patch is not None
    write = getattr(param.patch, "write", None)
    if write is not None and param.compute_dtype is None and write(view, tensor):
        return
    dtype = param.compute_dtype or view.dtype
    numbers = tensor if is_wrapper(view) else _numbers(tensor)
    is_copied = numbers.dtype != dtype or (in_place and numbers is tensor)
    if is_copied and not is_wrapper(numbers) and view.dtype == dtype and view.shape == numbers.shape:
        # Cast where it is to be: for a large weight, fresh memory for another copy costs as much as the patch.
        view.copy_(numbers)
        numbers = view
    elif numbers is tensor:
        numbers = _writable(tensor, dtype, in_place)
    elif is_copied:
        numbers = numbers.to(dtype)
    made = param.patch(numbers)
    if made is not view:
        copy_into(view, made.clone() if numbers is view and _share(made, view) else made)


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors lie in the same memory."""
    if is_wrapper(one):
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a weight, made anew for one in blocks. A wrapper whose patches know it stays as it is."""
    return tensor if stays_quantised(tensor) else numbers_of(tensor)


def _writable(tensor: torch.Tensor, dtype: torch.dtype, in_place: bool) -> torch.Tensor:
    """Return a weight in a dtype that a patch may write into. A wrapper whose patches know it stays as it is."""
    if stays_quantised(tensor):
        return tensor
    numbers = numbers_of(tensor)
    return numbers.to(dtype, copy=in_place and numbers is tensor)


def _quantise(param: Param, view: QuantisedForm, tensor: torch.Tensor, counters: Counters, in_place: bool) -> None:
    if param.patch is None:
        view.quantise_(tensor)
    elif view.down is not None:
        view.quantise_(tensor)
        _fill_branch(view, param.patch)
    else:  # merged in floating point, rounded once
        view.quantise_(param.patch(_writable(tensor, exact(view.dtype), in_place)))
        counters.patched += 1
    counters.quantised += 1


def _fill_branch(view: QuantisedForm | GgufWeight, patch: Any) -> None:
    """Write the matrices of a low-rank patch into the branch of a weight."""
    assert view.down is not None and view.up is not None
    down, up = patch.low_rank(view.device)
    view.down.copy_(down)
    view.up.copy_(up)
