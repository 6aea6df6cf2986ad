"""Several tensors in one aligned buffer, so that a module's weights travel in one transfer.

A tensor may be a wrapper subclass (a quantised tensor): its inner tensors are laid out one after the other and the
wrapper is built again around views of the buffer, through torch's `__tensor_flatten__` / `__tensor_unflatten__`
protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from .joined_weight import JoinedWeight

# Reads a tensor's bytes into host memory. Returns False where they are to be copied.
Read = Callable[[numpy.ndarray, torch.Tensor], bool]
# A VBAR allocation starts on 512 bytes; every kernel is content with less.
ALIGNMENT = 512


def aligned(nbytes: int) -> int:
    """Return `nbytes` rounded up to the alignment of a bundle's parts."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements, a wrapper's inner tensors included."""
    return sum(part.numel() * part.element_size() for part in inner_tensors(tensor))


def is_wrapper(tensor: Any) -> bool:
    """Say whether a tensor keeps its data in inner tensors."""
    return hasattr(tensor, "__tensor_flatten__")


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the ordinary tensors that hold the data, in the order in which they are gathered."""
    if not is_wrapper(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [part for name in names for part in inner_tensors(getattr(tensor, name))]


def memory_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the ordinary tensors in whose memory the numbers lie. Of a joined weight those are its pieces."""
    return [
        piece for part in inner_tensors(tensor) for piece in (part.pieces if isinstance(part, JoinedWeight) else [part])
    ]


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a template of the same shape in another dtype: a tensor without memory. Wrappers keep their own form."""
    return tensor if is_wrapper(tensor) else torch.empty(tensor.shape, dtype=dtype, device="meta")


def gathered_bytes(tensors: Sequence[torch.Tensor | None]) -> int:
    """Return the bytes of the buffer that holds all tensors."""
    total = 0
    for tensor in tensors:
        if tensor is not None:
            total += sum(aligned(part.numel() * part.element_size()) for part in inner_tensors(tensor))
    return total


def interpret_gathered_like(tensors: Sequence[torch.Tensor | None], buffer: torch.Tensor) -> list[torch.Tensor | None]:
    """Return views of `buffer` with the shapes, dtypes and wrappers of `tensors`; None stays None.

    `buffer` is one-dimensional uint8. Raises ValueError where it is not, or is too small.
    """
    if buffer.dim() != 1 or buffer.dtype != torch.uint8:
        raise ValueError(f"a gathered buffer is 1-D uint8, not {buffer.dim()}-D {buffer.dtype}")
    needed = gathered_bytes(tensors)
    if needed > buffer.numel():
        raise ValueError(f"the gathered tensors need {needed} bytes, the buffer has {buffer.numel()}")
    views: list[torch.Tensor | None] = []
    offset = 0
    for tensor in tensors:
        view = None
        if tensor is not None:
            view, offset = _view_like(tensor, buffer, offset)
        views.append(view)
    return views


def _view_like(template: torch.Tensor, buffer: torch.Tensor, offset: int) -> tuple[torch.Tensor, int]:
    """Return the view that begins at `offset`, and where the next one begins."""
    # No closure: one that calls itself is a reference cycle, and would keep the buffer until the collector runs.
    if not is_wrapper(template):
        stop = offset + template.numel() * template.element_size()
        return buffer[offset:stop].view(template.dtype).view(template.shape), aligned(stop)
    names, context = template.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {}
    for name in names:
        parts[name], offset = _view_like(getattr(template, name), buffer, offset)
    made = type(template).__tensor_unflatten__(parts, context, template.shape, None)  # type: ignore[attr-defined]
    return made, offset


def copy_into(
    target: torch.Tensor,
    source: torch.Tensor,
    non_blocking: bool = False,
    *,
    alone: bool = False,
    read: Read | None = None,
) -> None:
    """Copy, casting where the dtypes differ; wrappers are copied part by part.

    alone: by this thread, without torch's other CPU threads, which several readers at once would make compete.
    read: another way to bring a part's bytes, of those that such a thread copies.
    """
    for to, part in zip(*_pieces(inner_tensors(target), inner_tensors(source)), strict=True):
        if alone and part.numel() and to.dtype == part.dtype and _is_plain_memory(to) and _is_plain_memory(part):
            memory = _bytes(to)
            if read is None or not read(memory, part):
                numpy.copyto(memory, _bytes(part))  # without Python's lock
        else:
            to.copy_(part, non_blocking=non_blocking)


def _pieces(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return both with a joined source taken apart, and its target cut as that is."""
    if not any(isinstance(source, JoinedWeight) for source in sources):
        return targets, sources
    cut: list[torch.Tensor] = []
    for to, source in zip(targets, sources, strict=True):
        pieces = memory_of(source)
        cut += to.split([piece.shape[0] for piece in pieces]) if isinstance(source, JoinedWeight) else [to]
    return cut, [piece for source in sources for piece in memory_of(source)]


def _is_plain_memory(tensor: torch.Tensor) -> bool:
    # A subclass (FakeTensor: shapes without bytes) gives numpy nothing.
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _bytes(tensor: torch.Tensor) -> numpy.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()
