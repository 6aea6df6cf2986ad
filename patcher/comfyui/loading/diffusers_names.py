"""Has ComfyUI give a diffusers model its own names without reading a tensor.

ComfyUI joins some tensors (queries, keys and values) and swaps halves of others. What goes where is found out with
numbers of rows in the place of the tensors. Of those the weights are then made in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ....ops.files.disk_map import SourceError
from ....ops.joined_weight import JoinedWeight

Convert = Callable[..., Any]


def convert_lazily(convert: Convert, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    """Do what ComfyUI's `convert_diffusers_mmdit` does with a state dict: what is used leaves it.

    Raises SourceError where a part of a joined weight is missing, which ComfyUI would fill with whatever was in memory.
    """
    if any(type(tensor) is not torch.Tensor for tensor in tensors.values()):
        return convert(tensors, *args, **kwargs)
    numbered, first = {}, [0]
    for tensor in tensors.values():
        first.append(first[-1] + (tensor.shape[0] if tensor.dim() else 1))
    for (key, tensor), start, stop in zip(tensors.items(), first, first[1:], strict=False):
        shape = (stop - start, *(1 for _ in tensor.shape[1:])) if tensor.dim() else ()
        numbered[key] = torch.arange(start, stop).view(shape)
    keys, left = list(tensors), dict(numbered)
    made = convert(left, *args, **kwargs)
    if made is None:
        return None
    rows = _Rows(keys, first, tensors)
    empty = {id(numbers): tensors[key] for key, numbers in numbered.items() if not numbers.numel()}
    weights: dict[str, torch.Tensor] = {}
    for name, numbers in made.items():
        weight = empty[id(numbers)] if id(numbers) in empty else rows.weight(name, numbers.reshape(-1))
        if weight is None:  # numbers were computed with, and not only moved
            return convert(tensors, *args, **kwargs)
        weights[name] = weight
    for key in keys:
        if key not in left:
            del tensors[key]
    return weights


class _Rows:
    """All rows of a file, numbered. first: of each key, and one past the last."""

    def __init__(self, keys: list[str], first: list[int], tensors: dict[str, torch.Tensor]) -> None:
        self.keys, self.tensors = keys, dict(tensors)
        self.first = torch.tensor(first)
        self.used = torch.zeros(first[-1], dtype=torch.bool)

    def _key(self, number: int) -> str:
        return self.keys[int(torch.searchsorted(self.first, number, right=True)) - 1]

    def weight(self, name: str, numbers: torch.Tensor) -> torch.Tensor | None:
        """Return the weight with these rows. None where they are no rows of the file."""
        inside = (numbers >= 0) & (numbers < len(self.used))
        known = numbers[inside]
        if not known.numel():
            return None
        missing = known.numel() < numbers.numel() or bool(self.used[known].any())
        self.used[known] = True
        if missing or known.unique().numel() < known.numel():
            found = ", ".join(dict.fromkeys(self._key(int(number)) for number in known[:: max(1, len(known) // 9)]))
            raise SourceError(
                f"'{name}' is made of several tensors of the file, and only a part of them is there: {found}. The file "
                "is incomplete: get it again."
            )
        # A piece ends where the next row is another one than the next of the same tensor.
        starts = torch.searchsorted(self.first, numbers, right=True) - 1
        breaks = (numbers[1:] != numbers[:-1] + 1) | (starts[1:] != starts[:-1])
        ends = [*(torch.nonzero(breaks).reshape(-1) + 1).tolist(), len(numbers)]
        pieces, begin = [], 0
        for end in ends:
            at = int(starts[begin])
            row = int(numbers[begin]) - int(self.first[at])
            tensor = self.tensors[self.keys[at]]
            whole = row == 0 and end - begin == (tensor.shape[0] if tensor.dim() else 1)
            pieces.append(tensor if whole else tensor[row : row + end - begin])
            begin = end
        if len(pieces) == 1:
            return pieces[0]
        if any(piece.shape[1:] != pieces[0].shape[1:] or piece.dtype != pieces[0].dtype for piece in pieces):
            raise SourceError(
                f"'{name}' is made of tensors of the file that do not fit each other: "
                f"{', '.join(f'{list(piece.shape)} {piece.dtype}' for piece in pieces)}. Get the file again."
            )
        return JoinedWeight(pieces)
