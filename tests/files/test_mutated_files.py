"""Damaged files: ten thousand mutations of headers and bodies give an error with a reason, or the right tensors."""

import copy
import json
import math
import os
import random
import struct
import time

import psutil
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spillway.ops.files.disk_map import DTYPES, DiskMap, SourceError
from spillway.ops.files.probe import probe
from spillway.ops.files.safetensors_header import MAX_ELEMENTS
from spillway.ops.files.safetensors_writer import NAMES

NUMBERS = [0, 1, 2, 3, 7, 8, 12, 24, 255, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -1, 1.5, 1e300]
OTHERS = [None, True, "", "F32", "F99", "I8", "U8", "BOOL", [], {}, [0], [0, 8], [[0]], "\ud800", "x" * 200]
EXAMPLES = 5000  # of each of the two tests


def original(seed):
    """(header, body) of a small valid file."""
    rng = random.Random(seed)
    header, end = {"__metadata__": {"format": "pt", "a": "b"}}, 0
    for index in range(rng.randrange(1, 5)):
        name = rng.choice(["F32", "BF16", "I8", "U8", "BOOL", "F8_E4M3", "I64"])
        shape = [rng.randrange(0, 4) for _ in range(rng.randrange(0, 3))]
        nbytes = DTYPES[name].itemsize
        for size in shape:
            nbytes *= size
        header[f"layer.{index}.weight"] = {"dtype": name, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return header, rng.randbytes(end).translate(bytes([0, 1] * 128))  # zeros and ones: right for every dtype


def packed(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def places(value, found):
    """(container, key) of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        found.append((value, key))
        places(inner, found)
    return found


@st.composite
def other_values(draw):
    """A file whose header is JSON, but says something else."""
    header, body = original(draw(st.integers(0, 30)))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(header, [])))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = copy.deepcopy(draw(st.sampled_from(OTHERS)))
        elif kind == 2 and isinstance(container, dict):
            container[draw(st.sampled_from(["__metadata__", "shape", "dtype", "new"]))] = container[key]
        else:
            container[key] = draw(st.sampled_from(NUMBERS))
        if not header:
            break
    return packed(header, body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body)


@st.composite
def other_bytes(draw):
    """A file of which bytes have been changed, lost or added anywhere."""
    data = bytearray(packed(*original(draw(st.integers(0, 30)))))
    for _ in range(draw(st.integers(1, 4))):
        kind, place = draw(st.integers(0, 3)), draw(st.integers(0, max(0, len(data) - 1)))
        some = draw(st.binary(min_size=1, max_size=9))
        if kind == 0:
            data[place : place + len(some)] = some
        elif kind == 1:
            data[place:place] = some
        elif kind == 2:
            del data[place : place + len(some)]
        else:
            del data[place:]
    return bytes(data)


def reference(data):
    """{key: (dtype, shape, bytes)} by the format's reference implementation; None where it refuses."""
    try:
        found = safetensors.deserialize(data)
    except Exception:  # of its own kind, and of others
        return None
    return {key: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for key, entry in found}


def torch_holds(dtype, shape, _):
    """Not every tensor of the format: some dtypes torch has no name for, and it counts an empty one's elements too."""
    return dtype in DTYPES and math.prod(max(1, size) for size in shape) <= MAX_ELEMENTS


def check(data, path):
    path.write_bytes(data)
    wanted = reference(data)
    begun = time.perf_counter()
    mapped, error = attempt(lambda: DiskMap(path))
    read = {} if mapped is None else mapped.state_dict()
    if mapped is None:
        assert str(path) in error and len(error) < 2000
        assert wanted is None or not all(torch_holds(*entry) for entry in wanted.values()), error
    for key, tensor in read.items():
        spec = mapped.spec(key)
        assert 8 <= spec.offset and spec.offset + spec.nbytes <= len(data)
        assert tensor.numel() * tensor.element_size() == spec.nbytes
        found = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        assert found == data[spec.offset : spec.offset + spec.nbytes]
        assert wanted is None or (NAMES[tensor.dtype], tuple(tensor.shape), found) == wanted[key]
    assert mapped is None or wanted is None or set(read) == set(wanted)
    found, error = attempt(lambda: probe(path).words)
    assert path.name in (found or error)
    assert time.perf_counter() - begun < 2.0


def attempt(function):
    """(result, None), or (None, what the error says)."""
    try:
        return function(), None
    except SourceError as error:
        return None, str(error)


@pytest.mark.parametrize("files", [other_values(), other_bytes()], ids=["other values", "other bytes"])
def test_mutated(files, tmp_path):
    path, process = tmp_path / "x.safetensors", psutil.Process()
    before = process.memory_info().rss

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(data=files)
    def run(data):
        check(data, path)

    run()
    assert process.memory_info().rss - before < 200e6
    assert os.listdir(tmp_path) == [path.name]
