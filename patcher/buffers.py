"""Moves the buffers of a module to the device and back: small tensors that any of its methods may read or write."""

from __future__ import annotations

import torch

from ..ops.files.disk_map import check_files
from ..ops.gather import memory_of, tensor_bytes


class PlacedBuffers:
    """The buffers of `module`, on `device` between `place` and `give_back`. Buffers on the meta device stay there."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        # By module and name: the tensor as it was, the one on the device, and how often the latter was written into.
        self._placed: dict[tuple[torch.nn.Module, str], tuple[torch.Tensor, torch.Tensor, int]] = {}

    @property
    def nbytes(self) -> int:
        """Return the bytes that are on the device because of `place`."""
        return sum({id(there): tensor_bytes(there) for _, there, _ in self._placed.values()}.values())

    @property
    def due(self) -> int:
        """Return the bytes that `place` would move."""
        buffers = {id(b): b for m in self._module.modules() for b in m._buffers.values() if b is not None}
        return sum(tensor_bytes(b) for b in buffers.values() if b.device != self._device and not b.is_meta)

    def place(self) -> None:
        """Move what is elsewhere, also what somebody has put into the module since the last call."""
        moved: dict[int, torch.Tensor] = {}  # modules may share a buffer
        # Tensors of inference mode do not count writes.
        with torch.inference_mode(False):
            for module in self._module.modules():
                for attr, buffer in module._buffers.items():
                    if buffer is not None and buffer.device != self._device and not buffer.is_meta:
                        check_files(memory_of(buffer))
                        there = moved.setdefault(id(buffer), buffer.to(self._device))
                        module._buffers[attr] = there
                        self._placed[module, attr] = (buffer, there, there._version)

    def give_back(self) -> None:
        """Put the buffers back where they were, with what was written into them."""
        for (module, attr), (original, there, writes) in self._placed.items():
            now = module._buffers.get(attr)
            if now is there and there._version == writes:
                module._buffers[attr] = original
            elif now is not None:
                module._buffers[attr] = now.to(original.device)
        self._placed.clear()
