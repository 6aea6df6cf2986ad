"""Weights that are written into: what was written counts at any residency, is saved, and is never dropped."""

import mmap

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.nets import Stack, budget, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.cache.measure import module_sizes, storage
from spillway.ops.files import disk_map, mapped_file
from spillway.ops.files.copy_before_write import CopyBeforeWrite
from spillway.ops.files.deferred import Deferred, Stored, drop_pages
from spillway.ops.files.disk_map import DiskMap, SourceError
from spillway.ops.files.save_pipeline import save
from spillway.ops.files.source import StateDict
from spillway.ops.ram.available import Available
from spillway.patcher.policy import Policy

DEPTH = 4
KEY = "layers.1.weight"
DEVICES = {"cpu": lambda: None, "device": SimDevice}


def build():
    return Stack(DEPTH)


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "m.safetensors", build())
    return tmp_path / "m.safetensors"


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


@pytest.fixture
def kernel_is_silent(monkeypatch):
    """A system that does not tell which pages are private: torch's own count is all there is."""
    monkeypatch.setattr(disk_map, "has_private_pages", lambda address, nbytes: False)


@pytest.fixture
def never_overcommits(monkeypatch):
    """A system without room for a private map of a model."""
    make = mapped_file.MappedFile

    def refuse(*args, **kwargs):
        if kwargs.get("access") != mmap.ACCESS_READ:
            raise OSError(12, "Cannot allocate memory")
        return make(*args, **kwargs)

    monkeypatch.setattr(mapped_file, "MappedFile", refuse)


def change(tensor):
    with torch.no_grad():
        tensor[:] = tensor.flip(0) * 0.9  # small enough not to saturate what comes after


def expected(path):
    state = load_file(path)
    change(state[KEY])
    module = plain(build, state, torch.float32)
    return module(module.input())


def run(model):
    return model(model.module.input())


def weight(model):
    return model.module.get_parameter(KEY)


WRITES = {
    "slice": change,
    "view": lambda tensor: change(tensor.detach().view(-1).view(tensor.shape)),
    "inference": torch.inference_mode()(change),
    "data": lambda tensor: change(tensor.data),
    "numpy": lambda tensor: change(torch.from_numpy(tensor.detach().numpy())),
}
COUNTED = [name for name in WRITES if name not in ("data", "numpy")]


@pytest.mark.parametrize("how", WRITES)
def test_what_was_written_outlives_a_drop(path, how):
    mapped, wanted = DiskMap(path), load_file(path)[KEY]
    tensor, spec = mapped.tensor(KEY), mapped.spec(KEY)
    WRITES[how](tensor)
    change(wanted)
    mapped.drop(spec.offset, spec.nbytes)
    assert same(tensor, wanted) and same(mapped.tensor(KEY), wanted)


@pytest.mark.parametrize("how", COUNTED)
@pytest.mark.parametrize("inference", [False, True])
def test_torch_counts_where_the_kernel_is_silent(path, kernel_is_silent, how, inference):
    mapped, wanted = DiskMap(path), load_file(path)[KEY]
    with torch.inference_mode(inference):
        first, tensor = mapped.tensor(KEY), mapped.tensor(KEY)
    WRITES[how](torch.nn.Parameter(first, requires_grad=False))
    change(wanted)
    drop_pages(tensor)
    assert same(tensor, wanted) and same(first, wanted)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="Windows drops no pages")
def test_neighbours_of_what_was_written_are_dropped(path):
    mapped = DiskMap(path)
    tensors, dropped = mapped.state_dict(), []
    change(tensors[KEY])
    real = mapped._map

    class Advised:
        def madvise(self, option, start, nbytes):
            dropped.append(start)
            real.madvise(option, start, nbytes)

    mapped._map = Advised()
    for key in tensors:
        mapped.drop(mapped.spec(key).offset, mapped.spec(key).nbytes)
    large = [key for key in tensors if key.endswith("weight")]
    assert len(dropped) == len(large) - 1
    assert all(same(tensors[key], load_file(path)[key]) for key in tensors if key != KEY)


def test_a_range_over_several_tensors_is_kept_for_any_of_them(path, kernel_is_silent):
    mapped, wanted = DiskMap(path), load_file(path)
    tensors = mapped.state_dict()
    change(tensors[KEY])
    change(wanted[KEY])
    mapped.drop(0, mapped.file_bytes)
    assert all(same(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("fraction", [None, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silent", [False, True])
def test_written_before_between_and_after_runs(path, device, fraction, dtype, silent, request):
    """At any residency, used in place, cast, or on a device with pins; after every way to give memory back."""
    if silent:
        request.getfixturevalue("kernel_is_silent")
    state, source = load_file(path), DiskMap(path)
    tensors = source.state_dict()
    model = dynamic(build, source, dtype, device=device)
    model.set_policy(Policy(vram_bytes=budget(model, fraction)))

    def assert_right():
        module = plain(build, state, dtype)
        for _ in range(2):
            assert same(run(model), module(module.input()))

    def both():
        change(weight(model))
        read = state[KEY].to(dtype)  # what is read is in the dtype that the model computes in
        change(read)
        state[KEY].copy_(read)

    change(tensors[KEY])  # through a tensor of its own
    change(state[KEY])
    assert_right()
    both()
    assert_right()
    for give_back in (model.free, model.release, lambda: model.release(pins=False), model.free_pins):
        give_back()
        assert_right()
        both()
        give_back()
        assert_right()
    model.close()
    assert same(weight(model), state[KEY])
    assert any("written into" in line for line in model.ledger.decisions)


def test_what_was_written_is_saved(path, tmp_path):
    source, wanted = DiskMap(path), load_file(path)
    tensors = source.state_dict()
    change(tensors[KEY])
    change(wanted[KEY])
    deferred = {key: Deferred.of(Stored(tensor), tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    for name in ("first", "second"):  # the first gives the pages back
        save(tmp_path / name, deferred)
        assert all(same(tensor, wanted[key]) for key, tensor in load_file(tmp_path / name).items())


def test_a_write_into_memory_counts_too(path):
    """Not only in maps: what is resident of an ordinary tensor is made again."""
    state = load_file(path)
    model = dynamic(build, StateDict(state), device=SimDevice())
    run(model)
    change(state[KEY])
    assert same(run(model), expected(path))
    assert not any("written into" in line for line in model.ledger.decisions)


def test_written_pages_are_memory(path):
    model = dynamic(build, path, vram_bytes=0)
    run(model)
    assert module_sizes(model.module).ram == 0
    change(weight(model))
    assert storage(weight(model))[1] == weight(model).untyped_storage().nbytes()
    assert module_sizes(model.module).ram == weight(model).numel() * 4
    before = list(model.ledger.decisions)
    run(model)
    run(model)
    assert [line for line in model.ledger.decisions if line not in before] == [
        "64.0 KiB of weights were written into after they were read: they stay in memory."
    ]


# Maps that cannot be written to.


def test_where_a_private_map_is_refused_it_is_read_only(path, never_overcommits):
    mapped = DiskMap(path)
    assert mapped.read_only
    assert same(mapped.tensor(KEY), load_file(path)[KEY])


@pytest.mark.parametrize(("available", "read_only"), [(2.1, False), (1.9, True)])
def test_windows_maps_for_writing_while_that_leaves_as_much_to_others(path, monkeypatch, available, read_only):
    room = int(available * path.stat().st_size)
    monkeypatch.setattr(mapped_file, "available_ram", lambda: Available(room, room, "the test"))
    monkeypatch.setattr(mapped_file.sys, "platform", "win32")
    mapped = DiskMap(path)
    monkeypatch.undo()
    assert mapped.read_only is read_only
    if not read_only:
        before, wanted, tensor = path.read_bytes(), load_file(path)[KEY], mapped.tensor(KEY)
        change(tensor)
        change(wanted)
        drop_pages(tensor)
        assert same(tensor, wanted) and path.read_bytes() == before


@pytest.mark.parametrize(
    "op",
    [
        lambda tensor, new: tensor.__setitem__(slice(None), new),
        lambda tensor, new: tensor.copy_(new),
        lambda tensor, new: tensor.__isub__(tensor).__iadd__(new),
        lambda tensor, new: torch.mul(new, 1, out=tensor),
        lambda tensor, new: torch._foreach_copy_([tensor], [new]),
    ],
    ids=["slice", "method", "operator", "out", "foreach"],
)
def test_a_tensor_of_a_read_only_map_is_copied_before_it_is_written(path, never_overcommits, op):
    mapped, wanted = DiskMap(path), load_file(path)
    tensors = mapped.state_dict()
    change(wanted[KEY])
    before = {key: tensor.data_ptr() for key, tensor in tensors.items()}
    with torch.inference_mode(), CopyBeforeWrite() as guard:
        guard.watch(tensors.values())
        torch.nn.Parameter(tensors["layers.0.weight"], requires_grad=False).requires_grad_(False)
        op(tensors[KEY], wanted[KEY])
    assert [key for key in tensors if tensors[key].data_ptr() != before[key]] == [KEY]
    assert all(same(tensors[key], wanted[key]) for key in wanted)


def test_a_part_of_a_read_only_tensor_cannot_be_written(path, never_overcommits):
    mapped = DiskMap(path)
    tensors = mapped.state_dict()
    with CopyBeforeWrite() as guard:
        guard.watch(tensors.values())
        part = tensors[KEY].view(-1)
        with pytest.raises(SourceError, match=r"m\.safetensors: .* reading only"):
            part.mul_(2)


def test_a_tensor_without_elements_can_be_lent_twice(tmp_path):
    save_file({"none": torch.zeros(0, 3), "x": torch.ones(2)}, tmp_path / "a.safetensors")
    mapped = DiskMap(tmp_path / "a.safetensors")
    assert mapped.tensor("none").shape == (0, 3)
    assert not mapped.written(0, mapped.file_bytes)
    mapped.tensor("x").add_(1)
    assert mapped.written(0, mapped.file_bytes)
