"""What outputs hold: each storage and each model once, whatever they are wrapped in, and no output is too strange."""

import collections
import gc
import io
import types
import weakref

import numpy as np
import torch
from safetensors.torch import save_file

from spillway.cache.measure import Measurer, Model, module_bytes
from spillway.ops.files.disk_map import DiskMap

MIB = 1 << 20


def ram(outputs, getters=()):
    return sum(block.ram for block in Measurer(getters).blocks(outputs).values())


def tensor(mib):
    return torch.zeros(mib * MIB, dtype=torch.uint8)


def test_containers_and_views_count_a_storage_once():
    image = tensor(3)
    outputs = [[image, image[: MIB // 2]], {"samples": image.view(3, -1), "mask": tensor(1)}, (image,)]
    assert ram(outputs) == 4 * MIB


def test_a_view_holds_the_whole_storage():
    assert ram([tensor(8)[:16]]) == 8 * MIB


def test_objects_arrays_and_buffers():
    video = types.SimpleNamespace(parts={"images": tensor(2)}, sound=np.zeros(MIB, np.uint8))
    assert ram([[video]]) == 3 * MIB
    assert ram([io.BytesIO(bytes(MIB))]) == MIB
    whole = np.zeros((4, MIB), np.uint8)
    assert ram([whole[1], whole[2]]) == 4 * MIB
    assert ram([np.array([tensor(1), None], dtype=object)]) >= MIB


def test_meta_and_mapped_tensors_take_no_ram(tmp_path):
    save_file({"weight": tensor(2)}, tmp_path / "file.safetensors")
    disk_map = DiskMap(tmp_path / "file.safetensors")
    mapped = disk_map.tensor("weight")
    assert ram([mapped, torch.empty(MIB, device="meta")]) == 0
    assert ram([mapped.clone()]) == 2 * MIB


def test_wrapper_tensors_count_what_they_wrap():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, data):
            return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

        def __init__(self, data):
            self.data_, self.scale = data, torch.ones(1)

        def __tensor_flatten__(self):
            return ["data_", "scale"], {}

        @classmethod
        def __torch_dispatch__(cls, *_):
            raise NotImplementedError

    assert ram([Wrapper(tensor(2))]) == 2 * MIB + 4


def test_modules_are_models_and_shared_weights_count_once():
    layer = torch.nn.Linear(512, 512)
    model = torch.nn.Sequential(layer, layer)
    (block,) = Measurer().blocks([model]).values()
    assert block.is_model and block.ram == (512 * 512 + 512) * 4 == module_bytes(model)[0]


def test_a_gauge_does_not_keep_its_model():
    model = torch.nn.Linear(8, 8)
    weak = weakref.ref(model)
    blocks = Measurer().blocks([model])
    del model
    gc.collect()
    assert weak() is None
    assert next(iter(blocks.values())).gauge() == (0, 0)


def test_clones_share_their_model_and_have_patches_of_their_own():
    class Patcher:
        def __init__(self, model, patch):
            self.model, self.patch = model, patch

    def getter(value):
        return Model(value.model, lambda: module_bytes(value.model), [value.patch]) if type(value) is Patcher else None

    model, first, second = torch.nn.Linear(256, 256), tensor(1), tensor(2)
    blocks = Measurer([getter]).blocks([Patcher(model, first), Patcher(model, second)])
    assert [block.is_model for block in blocks.values()].count(True) == 1
    assert sum(block.ram for block in blocks.values()) == 3 * MIB + module_bytes(model)[0]


def test_cycles_end():
    loop = [tensor(1)]
    loop.append({"again": loop})
    knot = types.SimpleNamespace()
    knot.itself, knot.loop = knot, loop
    assert ram([knot, loop]) == MIB


def test_endless_and_deep_outputs_are_measured_in_part():
    deep = tensor(1)
    for _ in range(2000):
        deep = [deep]
    assert ram(deep) == 0
    assert ram([list(range(10)), [[i] for i in range(200_000)], tensor(1)]) >= 0


def test_what_raises_counts_nothing_and_is_said_once(caplog):
    class Sour(collections.UserDict):
        def values(self):
            raise RuntimeError("no")

    measurer = Measurer()
    for _ in range(3):
        found = measurer.blocks([Sour(a=tensor(4)), tensor(1), object()])
        assert sum(block.ram for block in found.values()) == MIB
    assert caplog.text.count("cannot be measured") == 1 and "Sour" in caplog.text


def test_a_getter_that_raises(caplog):
    def getter(value):
        raise ValueError("broken getter")

    assert ram([object(), tensor(1)], [getter]) == MIB
    assert "broken getter" in caplog.text
