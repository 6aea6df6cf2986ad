"""Write files that are wrong."""

import json
import os
import struct

import torch

from .diffusion_models import flux
from .writing import write


def truncated(path, keep=0.6, build=flux, **options):
    """A good header, but the data end early (as after a broken download)."""
    build(path, **options)
    os.truncate(path, int(os.path.getsize(path) * keep))
    return str(path)


def wrong_header(path, kind="json", build=flux, **options):
    """``kind``: "length" (beyond the file), "huge" (an absurd length), "json" (not JSON), "not_a_dict", "offsets"
    (beyond the data), "overlap" (two tensors on the same bytes), "size" (shape and bytes disagree), "dtype" (unknown),
    "negative" (a negative offset), or "short" (fewer than 8 bytes)."""
    build(path, **options)
    with open(path, "rb") as file:
        data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    first, second = [name for name in header if name != "__metadata__"][:2]
    size = None
    if kind == "length":
        size = len(data) + 1000
    elif kind == "huge":
        size = 2**63
    elif kind == "offsets":
        header[first]["data_offsets"] = [len(body) + 64, len(body) + 64 + header[first]["data_offsets"][1]]
    elif kind == "overlap":
        begin, end = header[second]["data_offsets"]
        header[second]["data_offsets"] = [begin - 2, end - 2]
    elif kind == "size":
        header[first]["shape"] = [*header[first]["shape"], 3]
    elif kind == "dtype":
        header[first]["dtype"] = "F12"
    elif kind == "negative":
        begin, end = header[first]["data_offsets"]
        header[first]["data_offsets"] = [begin - 8, end - 8]
    elif kind not in ("json", "not_a_dict", "short"):
        raise ValueError(f"unknown kind {kind!r}")
    text = {"json": b'{"a": [1, 2', "not_a_dict": b"[1, 2, 3]"}.get(kind) or json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(data[:5] if kind == "short" else struct.pack("<Q", size or len(text)) + text + body)
    return str(path)


def not_a_model(path, kind="tensors"):
    """``kind``: "tensors" (valid, but no known model), "none" (valid, no tensors), "empty" (no bytes), "text", or
    "html" (an error page saved under the model's name)."""
    if kind in ("tensors", "none"):
        names = {"tensors": ("alpha.weight", "beta.weight"), "none": ()}[kind]
        return write(path, {name: ((16, 16), torch.float32, 0.0, 1.0) for name in names})
    text = {
        "empty": b"",
        "text": b"this is not a model\n" * 40,
        "html": b"<!DOCTYPE html><html><body>404: not found</body></html>\n" * 20,
    }[kind]
    with open(path, "wb") as file:
        file.write(text)
    return str(path)


def missing_key(path, key, build=flux, **options):
    """A good file without the tensor ``key``."""
    build(path, drop=(key,), **options)
    return str(path)
