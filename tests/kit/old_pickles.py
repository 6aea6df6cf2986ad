"""Files as torch wrote them before 2020, under Python 2 and 3. No torch of today writes the older ones."""

import pickle
import struct
from collections import OrderedDict

import torch

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
STORAGES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.uint8: "Byte",
}


class Name:
    """A class or function by its name, which need not be there."""

    def __init__(self, name):
        self.module, _, self.short = name.rpartition(".")


class Made:
    """What a program of then would make: a call of `name`, and the state that it gets."""

    def __init__(self, name, *args, state=None):
        self.name, self.args, self.state = Name(name), args, state


class _Long(int):
    """A `long` of Python 2."""


class _Storage:
    def __init__(self, numbers, key, location, view=None):
        self.numbers, self.key, self.location, self.view = numbers, key, location, view


class _Pickler(pickle._Pickler):  # the one in C cannot be changed
    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 - as the class has it

    def __init__(self, file, python):
        super().__init__(file, protocol=2)
        self.python = python

    def persistent_id(self, found):
        if not isinstance(found, _Storage):
            return None
        kind, count = Name(f"torch.{STORAGES[found.numbers.dtype]}Storage"), found.numbers.numel()
        count = _Long(count) if self.python == 2 else count
        return "storage", kind, found.key, found.location, count, found.view

    def save(self, found, save_persistent_id=True):
        if isinstance(found, Name):
            self.write(pickle.GLOBAL + f"{found.module}\n{found.short}\n".encode())
        elif isinstance(found, _Long):
            data = pickle.encode_long(int(found))
            self.write(pickle.LONG1 + bytes([len(data)]) + data)
        elif isinstance(found, Made):
            self.save(found.name)
            self.save(found.args)
            self.write(pickle.REDUCE)
            if found.state is not None:
                self.save(found.state)
                self.write(pickle.BUILD)
        else:
            super().save(found, save_persistent_id)

    def save_text(self, text):
        """Python 2 has bytes for texts."""
        if self.python == 3 and isinstance(text, str):
            return self.save_str(text)
        data = text if isinstance(text, bytes) else text.encode()
        assert len(data) < 256
        self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        self.memoize(text)

    def save_ordered(self, found):
        if self.python == 3:
            return self.save_reduce(*found.__reduce_ex__(2), obj=found)
        self.save(Made("collections.OrderedDict", [[key, value] for key, value in found.items()]))

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[OrderedDict] = save_ordered


def write_old(path, tensors, rebuild="_rebuild_tensor_v2", python=3, location="cpu", views=False, wrap=lambda x: x):
    """Write tensors by name as torch.save did.

    rebuild: `_rebuild_tensor` before torch 0.4. location: cuda:0 for weights that lay on a card. views: each tensor has
    a storage that is a part of another, as before torch 0.4. wrap: makes what is saved of the state dict.
    """
    storages, state = {}, OrderedDict()
    for name, tensor in tensors.items():
        whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        key = str(tensor.untyped_storage().data_ptr() or 1)
        storages.setdefault(key, _Storage(whole, key, location))
        offset, storage = tensor.storage_offset(), storages[key]
        if views and tensor.numel():
            view = (f"{key}{len(state)}", offset, whole.numel() - offset)
            storage, offset = _Storage(whole, key, location, view), 0
        more = (False, OrderedDict()) if rebuild == "_rebuild_tensor_v2" else ()
        place = (storage, offset, tuple(tensor.shape), tensor.stride())
        state[name] = Made(f"torch._utils.{rebuild}", *place, *more)
    keys = sorted(storages)
    with open(path, "wb") as file:
        for part in (MAGIC, PROTOCOL, SYSTEM, wrap(state), keys):
            _Pickler(file, python).dump(part)
        for key in keys:
            numbers = storages[key].numbers
            file.write(struct.pack("<q", numbers.numel()) + numbers.numpy().tobytes())
    return path
