"""The safetensors map: right values for every dtype, an error with advice for everything else."""

import ctypes
import json
import mmap
import os
import re
import struct
import sys

import psutil
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kit.nets import bits, same, steady
from spillway.ops.files.disk_map import DTYPES, DiskMap, SourceError, locate, open_maps
from spillway.ops.files.probe import probe
from spillway.ops.files.read_whole import read_whole
from spillway.ops.files.safetensors_header import MAX_HEADER_BYTES
from spillway.ops.parts.open_map import open_map


def raw(header, data=b""):
    """The bytes of a file with any header: an object for JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def random_bits(dtype, shape):
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


# Right values


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_view_equals_what_safetensors_loads(tmp_path, dtype):
    path = tmp_path / "a.safetensors"
    save_file(
        {"x": random_bits(dtype, (3, 5)), "one": random_bits(dtype, ()), "none": random_bits(dtype, (0, 4))}, path
    )
    ours, theirs = DiskMap(path).state_dict(), load_file(path)
    assert set(ours) == set(theirs)
    assert all(same(ours[key], theirs[key]) for key in theirs)


def test_tensors_that_lie_unaligned_are_read_right(tmp_path):
    path = tmp_path / "a.safetensors"
    values = torch.arange(5, dtype=torch.float64)
    data = b"\1\2\3" + values.numpy().tobytes()
    path.write_bytes(raw({"pad": entry("U8", [3], [0, 3]), "x": entry("F64", [5], [3, 43])}, data))
    tensor = DiskMap(path).tensor("x")
    assert tensor.data_ptr() % 8
    assert torch.equal(tensor, values)


def test_spec_tells_dtype_shape_and_place_without_reading(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(6, dtype=torch.int32).view(2, 3)}, path)
    spec = DiskMap(path).spec("x")
    assert (spec.dtype, spec.shape, spec.nbytes) == (torch.int32, (2, 3), 24)
    assert path.read_bytes()[spec.offset : spec.offset + 24] == torch.arange(6, dtype=torch.int32).numpy().tobytes()


def test_metadata_is_kept_apart_from_the_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "pt"})
    disk_map = DiskMap(path)
    assert disk_map.metadata == {"format": "pt"}
    assert list(disk_map.keys()) == ["x"]


def test_keep_and_rename_choose_and_name_the_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"model.x": torch.ones(2), "vae.y": torch.zeros(2)}, path)
    disk_map = DiskMap(path, keep=lambda key: key.startswith("model."), rename=lambda key: key.removeprefix("model."))
    assert list(disk_map.keys()) == ["x"]
    assert "x" in disk_map and "model.x" not in disk_map
    assert torch.equal(disk_map.tensor("x"), torch.ones(2))


def test_dtype_casts_numbers_and_leaves_indices_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.randn(3), "index": torch.tensor([70000]), "mask": torch.tensor([True])}, path)
    tensors = DiskMap(path, dtype=torch.bfloat16).state_dict()
    assert same(tensors["x"], load_file(path)["x"].bfloat16())
    assert tensors["index"].dtype == torch.int64
    assert tensors["mask"].dtype == torch.bool


def test_writing_to_a_tensor_does_not_change_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2000)}, path)
    before = path.read_bytes()
    DiskMap(path).tensor("x").fill_(7)
    assert path.read_bytes() == before
    assert torch.equal(DiskMap(path).tensor("x"), torch.ones(2000))


def test_a_tensor_outlives_its_map(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(1000)}, path)
    tensor = DiskMap(path).tensor("x")
    assert torch.equal(tensor, torch.arange(1000))


def test_dropped_and_read_ahead_pages_hold_the_same_values(tmp_path):
    path = tmp_path / "a.safetensors"
    values = torch.randn(100_000)
    save_file({"x": values}, path)
    disk_map = DiskMap(path)
    tensor, spec = disk_map.tensor("x"), disk_map.spec("x")
    for advise in (disk_map.drop, disk_map.will_need, disk_map.drop):
        assert torch.equal(tensor, values)
        advise(spec.offset, spec.nbytes)
    assert torch.equal(tensor, values)


@pytest.mark.skipif(sys.platform != "linux", reason="the page cache is asked by mincore, as Linux has it")
def test_what_leaves_the_page_cache_is_read_from_the_disk_again(tmp_path):
    path = tmp_path / "a.safetensors"
    values = torch.randn(1 << 20)
    save_file({"x": values, "y": values.clone()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # a page that is yet to be written stays

    disk_map = DiskMap(path)
    x, y = disk_map.spec("x"), disk_map.spec("y")
    assert torch.equal(disk_map.tensor("x"), values) and torch.equal(disk_map.tensor("y"), values)
    if not cached(disk_map, x) > 0.9:
        pytest.skip("this file system has no page cache that mincore tells of")
    disk_map.drop(x.offset, x.nbytes)
    assert cached(disk_map, x) > 0.9
    disk_map.drop(x.offset, x.nbytes, from_cache=True)
    assert cached(disk_map, x) < 0.1 and cached(disk_map, y) > 0.9
    assert torch.equal(disk_map.tensor("x"), values)


def cached(disk_map: DiskMap, spec) -> float:
    """Return the share of a tensor's pages that are in RAM."""
    page = mmap.PAGESIZE
    start, end = -(-spec.offset // page) * page, (spec.offset + spec.nbytes) // page * page
    pages = (ctypes.c_ubyte * ((end - start) // page))()
    address, length = ctypes.c_void_p(disk_map.address + start), ctypes.c_size_t(end - start)
    assert ctypes.CDLL(None, use_errno=True).mincore(address, length, pages) == 0
    return sum(one & 1 for one in pages) / len(pages)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 0), (1, 1), (4095, 2), (0, 5000)])
def test_advice_on_part_of_a_page_is_harmless(tmp_path, offset, nbytes):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2000)}, path)
    disk_map = DiskMap(path)
    disk_map.drop(offset, nbytes)
    disk_map.will_need(offset, nbytes)
    assert torch.equal(disk_map.tensor("x"), torch.ones(2000))


def test_locate_finds_the_place_of_a_view(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(12).view(3, 4)}, path)
    disk_map = DiskMap(path)
    spec, tensor = disk_map.spec("x"), disk_map.tensor("x")
    assert locate(tensor) == (disk_map, spec.offset, spec.nbytes)
    assert locate(tensor[1]) == (disk_map, spec.offset + 32, 32)
    assert disk_map in set(open_maps())


def test_locate_knows_what_is_not_in_a_map(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(12).view(3, 4), "none": torch.zeros(0)}, path)
    disk_map = DiskMap(path)
    for tensor in (disk_map.tensor("x").clone(), disk_map.tensor("x").t(), disk_map.tensor("none"), torch.ones(3)):
        assert locate(tensor) is None


@pytest.mark.skipif(sys.platform != "linux", reason="makes a sparse file")
def test_a_file_larger_than_the_memory_of_the_machine_can_be_mapped(tmp_path):
    nbytes = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    head = raw({"x": entry("U8", [nbytes], [0, nbytes])})
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + nbytes)
    assert DiskMap(path).tensor("x")[-1] == 0


# Errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "has 0 bytes.*copy the file again", id="empty file"),
        pytest.param(b"\1\2\3", "has 3 bytes.*copy the file again", id="shorter than its length field"),
        pytest.param(struct.pack("<Q", 50) + b"{}", "truncated inside its header.*again", id="truncated header"),
        pytest.param(struct.pack("<Q", 0), "header is not JSON.*again", id="no header"),
        pytest.param(struct.pack("<Q", MAX_HEADER_BYTES + 1), "not a safetensors file.*convert", id="header too long"),
        pytest.param(b"\x80\x02}q\x00X\x05\x00.", "not a safetensors file.*convert", id="a pickle with a wrong name"),
        pytest.param(raw(b"{'x': 1}"), "header is not JSON.*again", id="not JSON"),
        pytest.param(raw(b"\xff\xfe{}"), "header is not JSON.*again", id="not UTF-8"),
        pytest.param(raw('{"a": 1}'.encode("utf-16")), "header is not JSON.*again", id="UTF-16"),
        pytest.param(raw(b"[" * 100_000), "header is not JSON.*again", id="nested too deep"),
        pytest.param(raw([1, 2]), "header is a list.*again", id="header a list"),
        pytest.param(raw({"__metadata__": [1]}), "__metadata__.*again", id="metadata a list"),
        pytest.param(raw({"k": 5}), "'k'.*expected dtype, shape and data_offsets.*again", id="entry a number"),
        pytest.param(raw({"k": {"dtype": "F32"}}), "'k'.*expected dtype, shape.*again", id="entry incomplete"),
        pytest.param(raw({"k": entry(shape=[-2])}), "'k'.*expected dtype, shape.*again", id="negative size"),
        pytest.param(raw({"k": entry(shape=[2.0])}), "'k'.*expected dtype, shape.*again", id="size a float"),
        pytest.param(raw({"k": entry(shape=[True, 2])}), "'k'.*expected dtype, shape.*again", id="size a bool"),
        pytest.param(raw({"k": entry(offsets=[0, 8, 16])}), "'k'.*expected dtype, shape.*again", id="three offsets"),
        pytest.param(raw({"k": entry("F8_E9M9")}), "'k'.*F8_E9M9.*Known: .*BF16.*update torch", id="unknown dtype"),
        pytest.param(raw({"k": entry(offsets=[8, 0])}), "'k'.*needs 8 bytes.*again", id="offsets reversed"),
        pytest.param(raw({"k": entry(shape=[3])}, b"12345678"), "'k'.*needs 12 bytes.* 8.*again", id="shape too large"),
        pytest.param(raw({"k": entry(shape=[1 << 62, 1 << 62, 0], offsets=[0, 0])}), "'k'.*again", id="absurd shape"),
        pytest.param(raw({"k": entry(shape=[1 << 70, 0], offsets=[0, 0])}), "'k'.*again", id="absurd size"),
        pytest.param(raw({"k": entry()}, b"1234567"), "truncated: tensor 'k'.*again", id="truncated data"),
        pytest.param(
            raw({"a": entry(), "k": entry(offsets=[4, 12])}, bytes(12)), "'k'.*overlap.*'a'.*again", id="overlap"
        ),
    ],
)
def test_a_malformed_file_is_an_error_with_path_and_advice(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=f"(?s){re.escape(str(path))}.*{message}"):
        DiskMap(path)


@pytest.mark.parametrize("cut", [1, 8, 100, 4000])
def test_a_whole_file_cut_short_names_the_tensor_that_is_missing(tmp_path, cut):
    path = tmp_path / "a.safetensors"
    save_file({"first": torch.zeros(10), "second": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(SourceError, match=r"truncated: tensor 'second' ends at byte \d+, the file has \d+"):
        DiskMap(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".PT"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(SourceError, match=re.escape(str(path)) + r".*pickles.*Convert to Safetensors.*dev\.py convert"):
        DiskMap(path)


def test_a_path_without_a_file_is_an_error(tmp_path):
    with pytest.raises(SourceError, match=re.escape(str(tmp_path / "none.safetensors")) + ": no such file"):
        DiskMap(tmp_path / "none.safetensors")


def test_a_folder_is_an_error_that_says_so(tmp_path):
    with pytest.raises(SourceError, match=re.escape(str(tmp_path)) + ".*folder"):
        DiskMap(tmp_path)


def test_a_key_that_is_not_there_is_an_error_that_names_some_that_are(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"blocks.0.weight": torch.zeros(1)}, path)
    disk_map = DiskMap(path)
    for ask in (disk_map.tensor, disk_map.spec):
        with pytest.raises(SourceError, match=re.escape(str(path)) + r".*no tensor 'x'.*such as blocks\.0\.weight"):
            ask("x")


def test_two_tensors_renamed_to_one_name_are_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, path)
    with pytest.raises(SourceError, match="two tensors are named 'x' after renaming"):
        DiskMap(path, rename=lambda key: "x")


def test_a_bad_tensor_that_is_not_kept_does_no_harm(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({"x": entry(), "new": entry("F3_E1M1", [8], [8, 11])}, bytes(11)))
    assert list(DiskMap(path, keep=lambda key: key == "x").keys()) == ["x"]


# Whatever is done to a file: an error that we promise, or the right values


def whole_file():
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], [0, 24]),
        "b": entry("BF16", [], [24, 26]),
        "c": entry("I8", [4], [26, 30]),
    }
    return header, bytes(range(30))


def check(path, content):
    """What a user gets from these bytes: a SourceError, or what safetensors itself reads in them."""
    path.write_bytes(content)
    try:
        theirs = {name: (bytes(value["data"]), value["shape"]) for name, value in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        ours, refusal = DiskMap(path).state_dict(), None
    except SourceError as error:
        ours, refusal = {}, str(error)
    if refusal is not None:
        assert str(path) in refusal
        assert theirs is None, f"safetensors reads this file, we say: {refusal}"
        return
    read = {name: (bits(tensor).numpy().tobytes(), list(tensor.shape)) for name, tensor in ours.items()}
    if theirs is not None:
        assert read == theirs
    else:  # more lenient than safetensors, but what is read lies in the file
        assert all(data in content for data, _ in read.values())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 4, 24, -1, 1 << 31, 1 << 62, 1 << 70])
    | st.floats()
    | st.sampled_from(["F32", "BF16", "I8", "x", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=6,
)
fields = st.sampled_from(["dtype", "shape", "data_offsets", "more"])


@steady
@given(key=st.sampled_from(["a", "b", "c", "d", "__metadata__"]), field=st.none() | fields, value=values)
def test_any_header_is_read_right_or_refused(tmp_path, key, field, value):
    header, data = whole_file()
    if field is None or key not in header:
        header[key] = value
    else:
        header[key][field] = value
    check(tmp_path / "a.safetensors", raw(header, data))


@steady
@given(
    offsets=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=3, max_size=3),
)
def test_any_offsets_and_shapes_are_read_right_or_refused(tmp_path, offsets, sizes):
    header, data = whole_file()
    for index, key in enumerate("abc"):
        header[key]["data_offsets"] = sorted(offsets[2 * index : 2 * index + 2])
        header[key]["shape"] = sizes[index]
        header[key]["dtype"] = "U8"
    check(tmp_path / "a.safetensors", raw(header, data))


@steady
@given(
    place=st.integers(0, 300),
    cut=st.integers(0, 20),
    insert=st.binary(max_size=9),
    length=st.none() | st.integers(0, 999),
)
def test_any_bytes_are_read_right_or_refused(tmp_path, place, cut, insert, length):
    content = raw(*whole_file())
    content = content[:place] + insert + content[place + cut :]
    if length is not None:
        content = struct.pack("<Q", length) + content[8:]
    check(tmp_path / "a.safetensors", content)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file of Linux that opens and cannot be read")
@pytest.mark.parametrize("name", ["a.safetensors", "a.gguf"])
def test_a_file_that_the_system_does_not_read_is_named(tmp_path, name):
    """As on a disk with a broken sector, or a network drive that has gone."""
    path = tmp_path / name
    path.symlink_to("/proc/self/mem")
    for read in (open_map, probe, read_whole) if name == "a.safetensors" else (open_map,):
        with pytest.raises(SourceError, match=rf"{re.escape(str(path))}: it cannot be read"):
            read(path)


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files and memory rules of Linux")
def test_a_file_larger_than_ram_and_swap_can_be_mapped(tmp_path):
    nbytes = psutil.virtual_memory().total + psutil.swap_memory().total + (4 << 30)
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    path = tmp_path / "huge.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + nbytes)
        file.seek(-1, 2)
        file.write(b"\x07")
    tensor = DiskMap(path).tensor("w")
    assert tensor.numel() == nbytes
    assert int(tensor[0]) == 0
    assert int(tensor[-1]) == 7
