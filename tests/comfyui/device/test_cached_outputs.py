"""Outputs that lie on the device: served as they are, counted as its memory, and gone where a model needs the room."""

import comfy.model_management as mm
import comfy.sd
import execution
import nodes
import pytest
import torch
from comfy_execution import caching

from kit.comfyui.executor import MIB, NODES, RAN, Executor, node_class
from kit.comfyui.pairs import assert_same, run
from spillway.cache.comfyui import install as cache_install
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

CUDA = torch.device("cuda", 0)
EAGER = Policy(headroom_bytes=0)
LATENT, IMAGE = 1 << 20, 4 << 20  # numbers, of four bytes each


def numbers(count, seed):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(CUDA)


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(seed=1):
    return {
        "latent": node("DeviceLatent", value=seed),
        "image": node("DeviceImage", a=["latent", 0]),
        "save": node("Save", a=["image", 0], b=["latent", 0], value=seed),
    }


@pytest.fixture
def executor(card, monkeypatch):
    known = {
        **NODES,
        "DeviceLatent": node_class("DeviceLatent", lambda value=0, **_: ({"samples": numbers(LATENT, value)}, None)),
        "DeviceImage": node_class("DeviceImage", lambda a=None, **_: (a["samples"].repeat(IMAGE // LATENT), None)),
    }
    for name, kind in known.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    caching.NODE_CLASS_CONTAINS_UNIQUE_ID.clear()
    for name in ("init_ram_cache", "init_classic_cache"):
        monkeypatch.setattr(execution.CacheSet, name, getattr(execution.CacheSet, name))
    monkeypatch.setattr(mm, "free_memory", mm.free_memory)
    assert cache_install.install()
    executor = Executor()
    yield executor
    executor.cache.engine.clear()
    executor.real.reset()


def outputs(executor):
    """Tensors by kind of node."""
    entries = executor.cache.engine.entries.values()
    found = {entry.kind: executor.cache.engine.values[entry.key].outputs[0][0] for entry in entries}
    return {"DeviceLatent": found["DeviceLatent"]["samples"], "DeviceImage": found["DeviceImage"]}


def test_outputs_on_the_device_are_served_and_counted_there(card, executor):
    before, engine = card.memory("used"), executor.cache.engine
    assert sorted(executor.run(graph())) == ["DeviceImage", "DeviceLatent", "Save"]
    assert engine.vram_bytes() == 4 * (LATENT + IMAGE) == card.memory("used") - before
    assert engine.ram_bytes() < MIB
    first = outputs(executor)
    assert executor.run(graph()) == []
    for kind, tensor in outputs(executor).items():
        assert tensor is first[kind] and tensor.device == CUDA
    assert_same(first["DeviceLatent"].cpu(), numbers(LATENT, 1).cpu())
    del first, tensor
    engine.clear()
    assert card.memory("used") == before


def test_outputs_give_way_to_a_model(card, executor, flux):
    """The cheaper ones, no more than are short, and they are made again as they were."""
    wanted = run(comfy.sd.load_diffusion_model(flux))
    mm.unload_all_models()
    engine = executor.cache.engine
    executor.run(graph())
    picture = outputs(executor)["DeviceImage"].cpu()
    ours = comfy_load.load_diffusion_model(flux, policy=EAGER)
    assert_same(run(ours), wanted)
    assert executor.run(graph()) == [], "there was room for both"
    mm.unload_all_models()
    assert executor.run(graph()) == [], "nothing needed what the model had"
    needs = mm.minimum_inference_memory() + 2 * ours.model_size()
    with card.room(int(needs) - 4 * LATENT):
        assert_same(run(ours), wanted)
        assert 0 < engine.vram_bytes() <= 4 * IMAGE, "one of the two is enough"
        assert "a model needs the room on cuda:0" in engine.ledger.decisions[-1]
    mm.unload_all_models()
    assert executor.run(graph()) != []
    assert_same(outputs(executor)["DeviceImage"].cpu(), picture)


def test_what_the_prompt_will_still_read_stays(card, executor, flux, monkeypatch):
    """A model is loaded by a node between the latent and who reads it."""
    ours = comfy_load.load_diffusion_model(flux, policy=EAGER)

    def sample(**_):
        with card.room(MIB):
            mm.load_models_gpu([ours])
        return (None, None)

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Use", node_class("Use", sample))
    prompt = {
        "other": node("DeviceLatent", value=5),
        "latent": node("DeviceLatent", value=6),
        "first": node("Save", a=["other", 0], value=1),
        "use": node("Use", a=["latent", 0], b=["first", 0]),
        "save": node("Save", a=["latent", 0], b=["use", 0], value=2),
    }
    executor.run(prompt)
    held = [entry.label for entry in executor.cache.engine.entries.values() if entry.kind == "DeviceLatent"]
    assert held == ["latent"] and RAN.count(("DeviceLatent", 6)) == 1
