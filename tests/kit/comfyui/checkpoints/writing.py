"""Write safetensors files of seeded random numbers, one tensor after the other, and read their headers."""

import json
import math
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import comfy.ops
import torch

OPS = comfy.ops.disable_weight_init
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Noise:
    """Endless seeded N(0, 1): one pool of 2**22 - 3 numbers (a prime, so rows never repeat each other), entered
    elsewhere for each name."""

    SIZE = 2**22 - 3

    def __init__(self, seed=0):
        self.seed = seed
        self.pool = torch.randn(self.SIZE, generator=torch.Generator().manual_seed(seed))

    def chunks(self, name, count, mean, std, dtype):
        start = zlib.crc32(f"{self.seed}/{name}".encode()) % self.SIZE
        if start + count <= self.SIZE:
            yield self.pool[start : start + count].mul(std).add_(mean).to(dtype)
            return
        whole = self.pool.mul(std).add_(mean).to(dtype)
        while count > 0:
            part = whole[start : start + count]
            yield part
            count -= part.numel()
            start = 0


def _data(tensor):
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write(path, entries, seed=0, metadata=None, drop=()):
    """Write a .safetensors file of ``entries``: {name: (shape, dtype, mean, std)} or {name: tensor}."""
    entries = {name: entry for name, entry in entries.items() if name not in drop}
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, entry in entries.items():
        shape, dtype = (entry.shape, entry.dtype) if torch.is_tensor(entry) else entry[:2]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    noise = Noise(seed)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    begins = 8 + len(text)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(begins + end)

    def fill(name):
        entry, (begin, _) = entries[name], header[name]["data_offsets"]
        with open(path, "r+b") as file:
            file.seek(begins + begin)
            if torch.is_tensor(entry):
                file.write(_data(entry))
                return
            shape, dtype, mean, std = entry
            for chunk in noise.chunks(name, math.prod(shape), mean, std, dtype):
                file.write(_data(chunk))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a file of 24 GB takes one core a minute
        list(pool.map(fill, entries))
    return str(path)


def read_header(path):
    """{name: {"dtype", "shape", "data_offsets"}} of a .safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return header


def entries_of(module, dtype, prefix="", rename=None):
    """The entries of everything in a (meta) module's state dict; ``dtype`` may be a function of name and shape."""
    embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Embedding)}
    out = {}
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("gamma"):  # a norm, even where it has the shape of an image
            mean, std = 1.0, 0.1
        elif len(shape) >= 2 and name not in embeddings:
            mean, std = 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))
        elif len(shape) >= 2:
            mean, std = 0.0, 0.5
        elif name.endswith(("bias", "_emb", "embed", "embedding", "token")):
            mean, std = 0.0, 0.05
        else:  # a norm
            mean, std = 1.0, 0.1
        kind = dtype(name, shape) if callable(dtype) else dtype
        out[prefix + (rename(name) if rename else name)] = (shape, kind, mean, std)
    return out


def prefixed(entries, prefix):
    return {prefix + name: entry for name, entry in entries.items()}
