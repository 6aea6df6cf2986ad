"""A file, or several, as a mapping from key to tensor."""

import os
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import save_file

from spillway.ops.files.disk_map import DiskMap, SourceError, locate
from spillway.ops.files.disk_maps import DiskMaps
from spillway.ops.files.watched_file import FileChanged
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy


def steady(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def write(path, **tensors):
    save_file({name.replace("_", "."): tensor for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def two(tmp_path):
    one = write(tmp_path / "1.safetensors", a=steady(3, 5), b=steady(2))
    return one, write(tmp_path / "2.safetensors", c=steady(4))


@pytest.mark.parametrize("many", [False, True])
def test_files_are_a_mapping_of_what_safetensors_loads(two, many):
    whole = DiskMaps(two) if many else DiskMap(two[0])
    names = ["a", "b", "c"] if many else ["a", "b"]
    assert isinstance(whole, Mapping) and list(whole) == list(whole.keys()) == names and len(whole) == len(names)
    assert "a" in whole and "x" not in whole and 7 not in whole and whole.get("x") is None
    assert all(torch.equal(tensor, whole[name]) for name, tensor in whole.items())
    assert torch.equal(whole["a"], steady(3, 5)) and locate(whole["a"]) is not None  # a view: nothing was copied
    with pytest.raises(KeyError) as error:
        whole["x"]
    assert (
        isinstance(error.value, SourceError) and str(error.value).endswith(".") and "no tensor 'x'" in str(error.value)
    )


@pytest.mark.parametrize("many", [False, True])
def test_a_tensor_comes_on_the_device_that_was_asked_for(two, many):
    whole = DiskMaps(two, device="meta") if many else DiskMap(two[0], device="meta")
    assert whole["a"].device.type == "meta" and whole["a"].shape == (3, 5)
    assert whole.tensor("a").device.type == "cpu"
    assert DiskMap(two[0], device="cpu", dtype=torch.float64)["a"].dtype == torch.float64


@pytest.mark.parametrize("many", [False, True])
def test_a_changed_file_is_not_read(two, many):
    whole = DiskMaps(two) if many else DiskMap(two[0])
    os.truncate(two[0], 64)
    with pytest.raises(FileChanged):
        whole["a"]


def test_an_empty_file_is_an_empty_mapping_and_no_two_maps_are_equal(tmp_path, two):
    empty = write(tmp_path / "empty.safetensors")
    assert len(DiskMap(empty)) == 0 and list(DiskMap(empty)) == []
    maps = {DiskMap(two[0]), DiskMap(two[0]), DiskMap(empty)}
    assert len(maps) == 3


def test_a_key_of_two_files_is_an_error_with_their_names(tmp_path, two):
    again = write(tmp_path / "3.safetensors", c=steady(4))
    with pytest.raises(SourceError, match=r"'c' is in two files, .*2\.safetensors and .*3\.safetensors"):
        DiskMaps([*two, again])


def test_a_model_runs_from_several_files(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    state = net.state_dict()
    paths = []
    for index, key in enumerate(state):
        paths.append(tmp_path / f"{index}.safetensors")
        save_file({key: state[key]}, paths[-1])
    source = DiskMaps(paths)
    x = steady(2, 8)
    with torch.inference_mode():
        wanted = net(x)
        model = DynamicModel(net, source, policy=Policy(vram_bytes=0))
        assert torch.equal(model(x), wanted)
    model.close()
