"""What ComfyUI calls outside of a node's execution: whatever fails there, prompts go on; inside of one, errors show."""

import asyncio
import gc
import json
import sys
import weakref
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import nodes
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from comfy_execution import caching
from comfy_execution.utils import CurrentNodeContext

from kit.comfyui.executor import ALL, Executor, node_class, prompt
from kit.comfyui.pairs import SMALL
from spillway.cache.comfyui import cache as comfy_cache
from spillway.cache.comfyui import install as cache_install
from spillway.nodes import extension, routes
from spillway.ops import never_raises as module
from spillway.patcher.comfyui import patcher
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.comfyui.patcher import DynamicModelPatcher
from spillway.patcher.dynamic_model import DynamicModel

Cache = comfy_cache.SpillwayCache


class Planted(Exception):
    """What no code of the pack expects."""


def fails(*_, **__):
    raise Planted("planted")


def fails_for_ours(name):
    """A method of the class that ComfyUI's own caches have too: it fails for Spillway's alone."""
    whole = getattr(caching.BasicCache, name)

    def method(cache, *arguments):
        return fails() if isinstance(cache, Cache) else whole(cache, *arguments)

    return method


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch):
    monkeypatch.setattr(module, "_logged", set())


# --- the output cache -------------------------------------------------------------------------------------------------

BROKEN = {
    "set_prompt": (caching.BasicCache, "set_prompt", fails_for_ours("set_prompt")),
    "set_prompt, after the keys": (Cache, "_drop_old_outputs", fails),
    "begin_prompt": (comfy_cache.OutputCache, "begin_prompt", fails),
    "policies": (Cache, "_apply_policies", fails),
    "keys": (caching.CacheKeySetInputSignature, "get_data_key", fails),
    "all_node_ids": (caching.BasicCache, "all_node_ids", fails_for_ours("all_node_ids")),
    "lookup": (caching.BasicCache, "_get_immediate", fails_for_ours("_get_immediate")),
    "room": (Cache, "_make_room", fails),
    "keeping": (caching.BasicCache, "_set_immediate", fails_for_ours("_set_immediate")),
    "put": (comfy_cache.OutputCache, "put", fails),
    "relief": (comfy_cache.OutputCache, "relieve", fails),
    "needed": (Cache, "needed", fails),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cache_costs_no_prompt(executor, monkeypatch, name, caplog):
    monkeypatch.setattr(comfy_cache, "HISTORY_NEEDS_A_CLIENT", True)
    executor.limit(1000)
    executor.run(prompt(0))
    executor.limit(1, headroom=1)  # so that it evicts
    owner, attribute, broken = BROKEN[name]
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, broken)
        made = executor.run(prompt(1))
        assert "Save" in made and set(made) <= set(ALL)
        executor.run(prompt(2))
    assert "planted" in caplog.text, "else this shows nothing"
    executor.limit(1000)
    executor.run(prompt(3))
    assert "Sample" not in executor.run(prompt(3)), "the cache is whole again"
    engine = executor.cache.engine
    assert set(engine.values) == set(engine.entries) and None not in engine.values


def test_nodes_that_the_cache_was_not_told_of_share_nothing(executor):
    """Every one of them has the key None."""
    executor.run(prompt(1))
    cache = executor.cache

    async def both():
        await cache.set("nobody", "value")
        cache.set_local("nobody", "value")
        return [await cache.get("somebody"), cache.get_local("somebody")]

    assert asyncio.run(both()) == [None, None] and None not in cache.cache


def test_every_method_that_the_executor_calls_is_guarded():
    theirs = {name for name in dir(caching.RAMPressureCache) if not name.startswith("_")}
    harmless = {"clean_unused", "poll", "recursive_debug_dump"}
    for name in theirs - harmless:
        assert hasattr(vars(Cache).get(name), "__wrapped__"), f"{name} may raise"


def test_a_cache_that_cannot_be_made_leaves_comfyuis_own(installed, monkeypatch):
    monkeypatch.setattr(cache_install, "make_cache", fails)
    assert type(Executor().cache) is caching.RAMPressureCache


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(checkpoint):
    model = comfy_load.load_diffusion_model(checkpoint("flux", **SMALL))
    comfy.model_management.load_models_gpu([model])
    return model


def plant(patch, model, name):
    if name == "set_in_use_by_current_prompt":
        patch.setattr(model.model, "dynamic_pins", {})
    else:
        owner, attribute = {
            "model_patches_models": (comfy.model_patcher.ModelPatcher, "model_patches_models"),
            "partially_unload_ram": (DynamicModel, "free_pins"),
            "partially_unload": (DynamicModel, "free"),
            "detach": (DynamicModel, "release"),
            "loaded_size": (DynamicModel, "resident_bytes"),
        }[name]
        patch.setattr(owner, attribute, property(fails) if name == "loaded_size" else fails)


OUTSIDE = {
    "set_in_use_by_current_prompt": (lambda model: model.set_in_use_by_current_prompt(False), None),
    "model_patches_models": (lambda model: model.model_patches_models(), []),
    "partially_unload_ram": (lambda model: model.partially_unload_ram(1e30), 0),
    "unregister_inactive_pins": (lambda model: model.unregister_inactive_pins(1e30), 0),
    "partially_unload": (lambda model: model.partially_unload(model.offload_device, 1e30), 0),
    "loaded_size": (lambda model: model.loaded_size(), 0),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_model_that_fails_outside_of_a_node(model, monkeypatch, name, caplog):
    call, wanted = OUTSIDE[name]
    with monkeypatch.context() as patch:
        plant(patch, model, "partially_unload_ram" if name == "unregister_inactive_pins" else name)
        assert call(model) == wanted
        assert "failed (" in caplog.text and "Traceback" in caplog.text
        if name != "set_in_use_by_current_prompt":
            with CurrentNodeContext("prompt", "node"), pytest.raises(Planted):
                call(model)
    call(model)


@pytest.mark.parametrize("name", ["detach", "loaded_size"])
def test_a_model_that_cannot_be_unloaded_between_prompts(model, monkeypatch, name):
    """ComfyUI's worker does so when it is asked to free memory."""
    with monkeypatch.context() as patch:
        plant(patch, model, name)
        comfy.model_management.unload_all_models()
    comfy.model_management.unload_all_models()
    comfy.model_management.load_models_gpu([model])


@pytest.mark.parametrize("name", ["set_in_use_by_current_prompt", "model_patches_models"])
def test_a_prompt_whose_model_cannot_be_marked(executor, model, monkeypatch, name):
    """ComfyUI marks the models of a prompt as in use while it links its nodes, and takes that back at its end."""
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Load", node_class("Load", lambda **_: (model, "clip")))
    plant(monkeypatch, model, name)
    assert set(executor.run(prompt(1))) == set(ALL)
    assert set(executor.run(prompt(2))) == {"Sample", "Decode", "Save"}


def test_a_node_that_fails_with_a_model_that_cannot_be_named(executor, model, monkeypatch, caplog):
    """ComfyUI words what a node was given when that has failed, and catches nothing there."""
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Load", node_class("Load", lambda **_: (model, "clip")))
    with monkeypatch.context() as patch:
        patch.setitem(nodes.NODE_CLASS_MAPPINGS, "Fails", node_class("Fails", fails))
        patch.setattr(patcher, "in_words", fails)  # of the size that a name says
        failing = prompt(1)
        failing["lora"]["class_type"] = "Fails"
        with pytest.raises(AssertionError, match="planted"):  # the prompt failed, and its node is named
            executor.run(failing)
        assert "naming a model failed (Planted: planted)" in caplog.text
    assert "Save" in executor.run(prompt(2))


def test_a_model_that_cannot_be_given_up(checkpoint, monkeypatch, caplog):
    made = comfy_load.load_diffusion_model(checkpoint("flux", **SMALL))
    state, inner = made.state, weakref.ref(made.model)
    _ = made.dynamic
    attributes = []
    monkeypatch.setattr(DynamicModel, "close", fails)
    monkeypatch.setattr(state.attributes, "restore", lambda: attributes.append("restored"))
    DynamicModelPatcher.__del__(made)
    assert "giving up a model that nothing uses any more failed (Planted: planted)" in caplog.text
    assert attributes == ["restored"] and state.dynamic is None and inner() is not None
    del made
    gc.collect()


# --- routes and start-up ----------------------------------------------------------------------------------------------


def test_a_client_that_goes_before_its_body_has_come_is_no_failure(monkeypatch, caplog):
    table = web.RouteTableDef()
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(routes=table)))
    monkeypatch.setitem(sys.modules, "server", server)
    assert routes.install()
    monkeypatch.setattr(routes, "is_same_origin", lambda request: True)

    class Gone:
        async def read(self, nbytes):
            raise ConnectionResetError(104, "Connection reset by peer")

    posts = [route for route in table if route.method == "POST"]
    assert len(posts) == 5
    for route in posts:
        answer = asyncio.run(route.handler(make_mocked_request("POST", route.path, payload=Gone())))
        assert answer.status == 400 and "the connection ended" in json.loads(answer.body)["error"]
    assert not caplog.records


def test_routes_that_fail_say_so(monkeypatch):
    table = web.RouteTableDef()
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(routes=table)))
    monkeypatch.setitem(sys.modules, "server", server)
    assert routes.install()
    for owner, name in ((routes, "memory_report"), (routes, "is_same_origin"), (routes.compare, "current")):
        monkeypatch.setattr(owner, name, fails)
    assert len(table) == 7
    for route in table:
        answer = asyncio.run(route.handler(make_mocked_request(route.method, route.path)))
        assert answer.status == 500 and "the server's log says why" in json.loads(answer.body)["error"]


STEPS = ((cache_install, "install"), (routes, "install"), (extension, "sweep_noted"))


@pytest.mark.parametrize("broken", STEPS, ids=range(3))
def test_a_start_that_fails_in_part_has_the_rest(monkeypatch, broken):
    done = []
    for owner, name in STEPS:
        monkeypatch.setattr(owner, name, lambda *_, step=(owner, name): done.append(step) or [])
    monkeypatch.setattr(*broken, fails)
    asyncio.run(extension.SpillwayExtension().on_load())
    assert len(done) == 2 and broken not in done


def test_an_origin_that_is_no_address_is_another_site():
    assert not routes.is_same_origin(make_mocked_request("POST", "/", headers={"Origin": "http://[::1", "Host": "a"}))
