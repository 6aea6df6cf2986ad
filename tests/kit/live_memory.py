"""Counts the bytes of the tensors that live while a block runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """peak: the most bytes that tensors made inside have held at a time. beside: tensors that are there before."""

    def __init__(self, *beside):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in beside}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if type(tensor) is torch.Tensor:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage):
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, nbytes)

    def _gone(self, key, nbytes):
        self._known.discard(key)
        self.now -= nbytes
