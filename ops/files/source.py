"""The sources of weights: a file map (`DiskMap`) or tensors already in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from .safetensors_header import MissingTensor


class Source(Protocol):
    """Tensors by key. Asking for a tensor reads nothing."""

    def keys(self) -> Iterable[str]: ...

    def __contains__(self, key: str) -> bool: ...

    def tensor(self, key: str) -> torch.Tensor: ...


class StateDict:
    """A state dict in memory as a source. The tensors are used as they are, not copied."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], name: str = "the state dict") -> None:
        self.path = name
        self._tensors = tensors

    def keys(self) -> Iterable[str]:
        """Return the keys."""
        return self._tensors.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def tensor(self, key: str) -> torch.Tensor:
        """Return the tensor. Raises MissingTensor for a key that is not there."""
        try:
            return self._tensors[key].detach()
        except KeyError:
            raise MissingTensor(f"{self.path}: no tensor '{key}'.") from None
