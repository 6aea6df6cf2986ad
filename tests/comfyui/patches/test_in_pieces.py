"""A weight that is patched piece by piece has the bits of ComfyUI's function, and takes no memory of its size."""

import comfy.float
import comfy.lora
import pytest
import torch
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from torch.utils._python_dispatch import TorchDispatchMode

from spillway.patcher.comfyui.patches import pieces, plain_lora
from spillway.patcher.comfyui.patches.in_pieces import write_in_pieces

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(shape, rank, seed, strength=0.7, offset=None, dtype=torch.float16):
    up, down = numbers(shape[0], rank, *[1] * (len(shape) - 2), seed=seed), numbers(rank, *shape[1:], seed=seed + 1)
    return (strength, LoRAAdapter(set(), (up.to(dtype), down.to(dtype), 3.0, None, None, None)), 1.0, offset, None)


def comfyuis(weight, dtype, stages):
    weight = weight.to(dtype)
    for patches in stages:
        value = comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), "key")
        weight = comfy.float.stochastic_rounding(value, dtype)
    return weight


def ours(weight, dtype, stages):
    out = torch.full(weight.shape, float("nan"), dtype=dtype)
    return out, write_in_pieces(out, weight, stages)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 4, 16, 33, 128, 320])
@pytest.mark.parametrize("shape", [(2100, 700), (4097, 513), (31, 20000), (3, 300001), (16, 16), (1, 5), (5, 1)])
def test_bits_are_comfyuis(shape, rank, dtype):
    weight = numbers(*shape, seed=5)
    stages = [[lora(shape, rank, seed=1, dtype=torch.float32), lora(shape, 3, seed=2, strength=-0.4)]]
    got, done = ours(weight, dtype, stages)
    assert done and torch.equal(got, comfyuis(weight, dtype, stages))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", [*DTYPES, torch.float8_e4m3fn])
def test_what_a_file_holds_is_rounded_to_the_models_dtype_first(dtype, stored):
    weight = numbers(1200, 600, seed=5).to(stored)
    stages = [[lora(weight.shape, 8, seed=1)]]
    got, done = ours(weight, dtype, stages)
    assert done and torch.equal(got, comfyuis(weight, dtype, stages))


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_a_joined_weight_and_hooks_on_top(dtype):
    weight = numbers(3072, 512, seed=5)
    first = [lora((1024, 512), 8, seed=1, offset=(0, 1024, 1024)), lora((3072, 512), 4, seed=3)]
    hooks = [lora((3072, 128), 8, seed=6, offset=(1, 256, 128)), lora((512, 512), 2, seed=8, offset=(0, 2560, 512))]
    got, done = ours(weight, dtype, [first, hooks])
    assert done and torch.equal(got, comfyuis(weight, dtype, [first, hooks]))


def test_a_product_is_not_cut_into_a_few_rows():
    """Of matrices in fp32, products of a few rows are summed in another order, and have other bits."""
    whole = lora((3072, 512), 33, seed=3, dtype=torch.float32)
    for rows in range(1, 16):
        part = lora((rows, 512), 2, seed=8, offset=(0, 3072 - rows, rows), dtype=torch.float32)
        got, done = ours(numbers(3072, 512, seed=5), torch.float32, [[whole, part]])
        assert not done and got.isnan().all()
    large = lora((512, 512), 9, seed=8, offset=(0, 2560, 512), dtype=torch.float32)
    weight = numbers(3072, 512, seed=5)
    got, done = ours(weight, torch.float32, [[whole, large]])
    assert done and torch.equal(got, comfyuis(weight, torch.float32, [[whole, large]]))


def test_a_weight_without_any_patch_is_left_to_others():
    got, done = ours(numbers(8, 8, seed=5), torch.bfloat16, [])
    assert not done and got.isnan().all()


@pytest.mark.parametrize("shape", [(640, 320, 3, 3), (640, 320, 1, 1), (64, 600, 5), (900,)])
def test_weights_of_other_dimensions(shape):
    weight = numbers(*shape, seed=5)
    adapter = lora(shape, 4, seed=1) if len(shape) > 1 else lora((900, 1), 4, seed=1)
    got, done = ours(weight, torch.bfloat16, [[adapter]])
    assert done and torch.equal(got, comfyuis(weight, torch.bfloat16, [[adapter]]))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        given = {a.untyped_storage().data_ptr() for a in (*args, *(kwargs or {}).values()) if torch.is_tensor(a)}
        if torch.is_tensor(out) and out.untyped_storage().data_ptr() not in given:
            self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


def test_nothing_as_large_as_the_weight_is_made():
    weight, stages = numbers(4096, 4096, seed=5).bfloat16(), [[lora((4096, 4096), 8, seed=1)]]
    out = torch.empty_like(weight)
    with Largest() as largest:
        assert write_in_pieces(out, weight, stages)
    assert 0 < largest.nbytes <= 4 * pieces.PIECE_BYTES


OTHERS = {
    "another adapter": lambda: [(0.7, LoHaAdapter(set(), ()), 1.0, None, None)],
    "a strength of the model": lambda: [(*lora((8, 8), 2, seed=1)[:2], 0.5, None, None)],
    "a function": lambda: [(*lora((8, 8), 2, seed=1)[:4], lambda a: a * 2)],
    "a difference": lambda: [(1.0, ("diff", (numbers(8, 8, seed=1),)), 1.0, None, None)],
    "another shape": lambda: [lora((4, 16), 2, seed=1)],
    "one of another shape": lambda: [lora((8, 8), 2, seed=1), lora((9, 8), 2, seed=1)],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_lora_is_left_to_others(name):
    got, done = ours(numbers(8, 8, seed=5), torch.bfloat16, [OTHERS[name]()])
    assert not done and got.isnan().all()


def test_what_is_rounded_by_chance_is_left_to_others():
    out = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
    assert not write_in_pieces(out, numbers(8, 8, seed=5), [[lora((8, 8), 2, seed=1)]])


def test_a_pack_that_replaces_comfyuis_function_is_asked(monkeypatch):
    monkeypatch.setattr(comfy.lora, "calculate_weight", lambda *args, **kwargs: plain_lora._CALCULATE(*args, **kwargs))
    got, done = ours(numbers(8, 8, seed=5), torch.bfloat16, [[lora((8, 8), 2, seed=1)]])
    assert not done and got.isnan().all()
