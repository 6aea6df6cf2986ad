"""Plain LoRAs are added with ComfyUI's bits and in less memory. Others, and what a pack replaces, go ComfyUI's way."""

import logging

import comfy.lora
import pytest
import torch
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from torch.utils._python_dispatch import TorchDispatchMode

from spillway.patcher.comfyui.patches import plain_lora

OFFSETS = {"whole": None, "rows": (0, 8, 24), "columns": (1, 4, 16)}


def lora(shape, rank=4, alpha=2.0, **others):
    generator = torch.Generator().manual_seed(3)
    up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=generator)
    down = torch.randn((rank, *shape[1:]), generator=generator)
    parts = {"mid": None, "dora": None, "reshape": None, **others}
    return LoRAAdapter(set(), (up, down, alpha, *parts.values()))


def patch_of(adapter, strength=0.7, of_model=1.0, offset=None, function=None):
    return (strength, adapter, of_model, offset, function)


def both(patches, weight):
    wanted = comfy.lora.calculate_weight(patches, weight.clone(), "key")
    return plain_lora.calculate_weight(patches, weight.clone(), "key"), wanted


def test_this_comfyui_computes_as_is_known():
    assert plain_lora.is_comfyuis_own()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_bits_are_comfyuis(dtype, offset, alpha, stored):
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    part = weight if OFFSETS[offset] is None else weight.narrow(*OFFSETS[offset])
    one, two = lora(part.shape, alpha=alpha), lora(weight.shape, rank=7)
    one.weights = tuple(part.to(stored) if torch.is_tensor(part) else part for part in one.weights)
    got, wanted = both([patch_of(one, offset=OFFSETS[offset]), patch_of(two, -0.3)], weight)
    assert torch.equal(got, wanted) and not torch.equal(got, weight)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 4, 1, 1), (8, 6, 3)])
def test_convolutions_too(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    got, wanted = both([patch_of(lora(shape))], weight)
    assert torch.equal(got, wanted) and not torch.equal(got, weight)


@pytest.mark.parametrize(
    "patch",
    [
        patch_of(lora((48, 32), dora=torch.ones(48, 1))),
        patch_of(lora((48, 32)), of_model=0.5),
        patch_of(lora((48, 32)), function=lambda made: made * 2),
        patch_of(lora((48, 32), reshape=(64, 32))),
        patch_of(lora((40, 32))),  # of another shape: ComfyUI says so and leaves it out
        (0.5, (torch.ones(48, 32),), 1.0, None, None),
    ],
    ids=["DoRA", "model's strength", "function", "reshaped", "misfit", "difference"],
)
def test_others_go_through_comfyuis_function(patch):
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(5))
    assert plain_lora.as_plain(patch, weight) is None
    got, wanted = both([patch], weight)
    assert torch.equal(got, wanted)


def test_what_a_pack_puts_in_its_place_is_called(monkeypatch):
    weight, patches, calls = torch.zeros(48, 32), [patch_of(lora((48, 32)))], []
    monkeypatch.setattr(comfy.lora, "calculate_weight", lambda *given, **named: calls.append(given) or weight)
    plain_lora.calculate_weight(patches, weight, "key")
    assert len(calls) == 1
    monkeypatch.undo()
    monkeypatch.setattr(LoRAAdapter, "calculate_weight", lambda *given, **named: calls.append(given) or weight)
    plain_lora.calculate_weight(patches, weight, "key")
    assert len(calls) == 2


def test_one_temporary_of_the_weights_size_is_made():
    class Made(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            given = {
                one.untyped_storage().data_ptr() for one in (*args, *(kwargs or {}).values()) if torch.is_tensor(one)
            }
            if torch.is_tensor(made) and made.numel() == 48 * 32 and made.untyped_storage().data_ptr() not in given:
                Made.count += 1
            return made

    weight = torch.zeros(48, 32)
    with Made():
        assert plain_lora.calculate_weight([patch_of(lora((48, 32)))], weight, "key") is weight
    assert Made.count == 1


def full(*_, **__):
    raise torch.OutOfMemoryError("no memory")


def lokr(**_):
    return LoKrAdapter(set(), (torch.ones(8, 4), torch.ones(6, 8), 1.0, None, None, None, None, None, None))


def loha(**_):
    halves = (torch.ones(48, 4), torch.ones(4, 32))
    return LoHaAdapter(set(), (*halves, 1.0, *halves, None, None, None))


# What each of them computes with.
KINDS = {
    "plain": (lora, (48, 32), "torch.mm"),
    "DoRA": (lora, (48, 32), "comfy.weight_adapter.lora.weight_decompose"),
    "LoKr": (lokr, None, "torch.kron"),
    "LoHa": (loha, None, "torch.mm"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_is_missing_is_an_error(kind, monkeypatch):
    """ComfyUI's adapters log it and leave the patch out, which makes another picture."""
    make, shape, used = KINDS[kind]
    adapter = make(shape=shape, **({"dora": torch.ones(48, 1)} if kind == "DoRA" else {}))
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(both([patch_of(adapter)], weight)[0], weight)
    monkeypatch.setattr(used, full)
    with pytest.raises(torch.OutOfMemoryError):
        plain_lora.calculate_weight([patch_of(adapter)], weight.clone(), "key")
    comfy.lora.calculate_weight([patch_of(lokr())], weight.clone(), "key")  # which goes on, as it does without the pack


def test_other_errors_stay_comfyuis(monkeypatch, caplog):
    def wrong(*_, **__):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(torch, "kron", wrong)
    weight = torch.zeros(48, 32)
    assert plain_lora.calculate_weight([patch_of(lokr())], weight, "key") is weight and "of another kind" in caplog.text


def test_an_error_of_before_is_not_raised_again(caplog):
    """Weights give way and the patch is made once more, while the error of the first time is still being handled."""
    patch = (0.5, (torch.ones(48, 16),), 1.0, None, None)  # of another shape, which ComfyUI says in the log
    weight = torch.zeros(48, 32)
    try:
        full()
    except torch.OutOfMemoryError:
        assert plain_lora.calculate_weight([patch], weight, "key") is weight
    assert "SHAPE MISMATCH" in caplog.text


@pytest.mark.parametrize("how", ["level", "disabled"])
def test_a_log_without_errors_hides_none(how, monkeypatch, caplog):
    root = logging.getLogger()
    level = root.level
    monkeypatch.setattr(torch, "kron", full)
    try:
        if how == "level":
            root.setLevel(logging.CRITICAL)
        else:
            logging.disable(logging.ERROR)
        before = root.level, root.manager.disable
        with pytest.raises(torch.OutOfMemoryError):
            plain_lora.calculate_weight([patch_of(lokr())], torch.zeros(48, 32), "key")
        monkeypatch.setattr(torch, "kron", lambda *_: 1 / 0)
        plain_lora.calculate_weight([patch_of(lokr())], torch.zeros(48, 32), "key")
        assert (root.level, root.manager.disable) == before and not caplog.records
    finally:
        root.setLevel(level)
        logging.disable(logging.NOTSET)
