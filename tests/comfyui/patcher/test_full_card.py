"""Clones of one model on a card that it fills, where ComfyUI asks every load after the first to shrink the model."""

import copy

import comfy.model_management as mm
import pytest
import torch
from comfy.patcher_extension import CallbacksMP
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from kit.comfyui.dynamic_vram import told
from kit.comfyui.loras import QKV, forms, with_lora
from kit.comfyui.pairs import SMALL, assert_same, pair, run
from kit.device import is_real
from spillway.patcher.comfyui.compile.dynamic_models import CompileRequest


@pytest.fixture
def flux(checkpoint):
    return checkpoint("flux", **SMALL)


@pytest.fixture
def full(monkeypatch):
    """ComfyUI's loads, each asking for a quarter less than what is loaded."""
    asked = []

    def use_more(loaded, extra_memory, force_patch_weights=False):
        held = loaded.model.loaded_size()
        if held:
            extra_memory = -(held // 4)
        asked.append(extra_memory)
        return loaded.model.partially_load(loaded.device, extra_memory, force_patch_weights=force_patch_weights)

    monkeypatch.setattr(mm.LoadedModel, "model_use_more_vram", use_more)
    return asked


def sampled_otherwise(model):
    return ModelSamplingDiscrete().patch(model, "lcm", False)[0]


def object_replaced(model):
    clone = model.clone()
    other = copy.copy(model.model.latent_format)
    other.scale_factor = 9.0
    clone.add_object_patch("latent_format", other)
    return clone


def weight_wrapped(model):
    clone = model.clone()
    clone.add_weight_wrapper(f"{QKV}.weight", lambda weight: weight * 0.5)
    return clone


def with_a_lora(model):
    return with_lora(model, forms("diff"))


CLONES = [sampled_otherwise, object_replaced, weight_wrapped, with_a_lora]


@pytest.mark.parametrize("change", CLONES)
def test_each_clone_runs_as_itself(flux, full, change):
    """Whatever tells two clones apart: each gives what it gives with ComfyUI's own patcher, turn by turn."""
    core, ours = pair(flux, 1.0)
    wanted = run(core), run(change(core))
    assert all(one.isfinite().all() for one in wanted)
    assert not torch.equal(*wanted), "the change does something"
    full.clear()
    models = (ours, change(ours))
    for turn in (0, 1, 0, 0, 1, 1):
        got = run(models[turn])
        if is_real() and change is sampled_otherwise:
            # ComfyUI computes the schedule where the tables lie, on the CPU or on the card, by what ran before.
            assert (got - wanted[turn]).norm() < 1e-5 * wanted[turn].norm()
        else:
            assert_same(got, wanted[turn])
    assert sum(extra < 0 for extra in full) >= 5


def test_each_clone_has_its_own_policy_and_compile_request(flux, full):
    _, ours = pair(flux, 1.0)
    other = ours.clone()
    other.set_policy(ours.policy.with_changes(priority=3, pinned_bytes=1 << 20))
    compiled = other.clone()
    compiled.compile_request = CompileRequest(backend="eager")
    run(ours)
    assert ours.dynamic.policy == ours.policy != other.policy
    for patcher in (other, ours, other, compiled, other):
        run(patcher)
        assert patcher.dynamic.policy == patcher.policy
        computing = [block.compute for block in patcher.dynamic.blocks]
        assert any(compute is not None for compute in computing) == (patcher is compiled)
    assert any(extra < 0 for extra in full)


def test_a_callback_of_a_clone_is_called(flux, full):
    _, ours = pair(flux, 1.0)
    called, other = [], ours.clone()
    other.add_callback(CallbacksMP.ON_LOAD, lambda patcher, *_: called.append(patcher))
    run(ours)
    run(other)
    assert full[-1] < 0 and called == [other]


@told
def test_a_shrunk_model_gives_back_what_it_was_asked_for(flux):
    _, ours = pair(flux, 1.0)
    run(ours)
    clone, held = sampled_otherwise(ours), ours.loaded_size()
    returned = clone.partially_load(clone.load_device, -(held // 2))
    assert ours.loaded_size() <= held - held // 2 and returned == ours.loaded_size() - held
    assert clone.model.model_sampling is clone.object_patches["model_sampling"]
