"""The node INT8 Lazy Torch Compile: its inputs, and what it says where it does otherwise than asked."""

import asyncio
import importlib
import logging
import sys
from types import SimpleNamespace

import execution
import nodes as comfyui_nodes
import pytest
import torch
import torch._dynamo
import torch._dynamo.utils
from comfy_api.latest import io

from kit.comfyui.compiling import ARCHITECTURES, FAILED, ORDER, STORED, as_stored, compiled, said
from kit.comfyui.executor import Server
from kit.comfyui.pairs import SMALL, assert_same, run
from kit.device import is_fake
from spillway.nodes.compile import SpillwayLazyTorchCompile
from spillway.nodes.extension import SpillwayExtension
from spillway.nodes.old_ids import OLD_COMPILE, tell_of_replacements
from spillway.ops.compile import compiled_function as engine
from spillway.patcher.comfyui.compile.dynamic_models import CompileRequest
from spillway.patcher.comfyui.loading.load import load_diffusion_model


def test_inputs_and_defaults_are_those_of_stored_workflows():
    schema = SpillwayLazyTorchCompile.define_schema()
    assert [entry.id for entry in schema.inputs] == ORDER
    assert [entry.default for entry in schema.inputs[1:]] == STORED
    options = {entry.id: entry.options for entry in schema.inputs if getattr(entry, "options", None)}
    assert options == {
        "backend": ["inductor", "cudagraphs"],
        "mode": ["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"],
        "dynamic": ["auto", "true", "false"],
    }
    limit = next(entry for entry in schema.inputs if entry.id == "dynamo_cache_size_limit")
    assert (limit.min, limit.max) == (0, 2048)
    assert schema.node_id == "SpillwayLazyTorchCompile"


def listed():
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(SpillwayExtension().get_node_list())}


def test_workflows_with_the_old_id_are_served_where_no_other_pack_has_it(monkeypatch):
    monkeypatch.delitem(comfyui_nodes.NODE_CLASS_MAPPINGS, OLD_COMPILE, raising=False)
    old = listed()[OLD_COMPILE]
    schema = old.GET_SCHEMA()
    assert [entry.id for entry in schema.inputs[: len(ORDER)]] == ORDER  # by position, as workflow files have them
    assert schema.is_deprecated
    monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, OLD_COMPILE, old)
    assert OLD_COMPILE in listed()  # the pack is loaded again


def test_the_old_id_stays_with_the_pack_that_has_it(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "spillway")

    class Theirs:
        RELATIVE_PYTHON_MODULE = "custom_nodes.another_pack"

    monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, OLD_COMPILE, Theirs)
    ours = listed()
    assert OLD_COMPILE not in ours and "SpillwayLazyTorchCompile" in ours
    assert "another_pack" in caplog.text and "SpillwayLazyTorchCompile" in caplog.text


def test_comfyui_is_told_what_took_the_old_ids_place(monkeypatch):
    """Through its own list, twice, as a pack may be loaded again. A graph with the old id is left as it is."""
    manager = importlib.import_module("app.node_replace_manager").NodeReplaceManager()
    running = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(node_replace_manager=manager)))
    monkeypatch.setitem(sys.modules, "server", running)
    for _ in range(2):
        asyncio.run(tell_of_replacements())
    (told,) = manager.as_dict()[OLD_COMPILE]
    assert told["new_node_id"] == "SpillwayLazyTorchCompile"
    assert [entry["new_id"] for entry in told["input_mapping"]] == ORDER == ["model", *told["old_widget_ids"]]

    prompt = {"1": {"class_type": OLD_COMPILE, "inputs": {"model": ["2", 0], "verbose": True}, "_meta": {}}}
    monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, OLD_COMPILE, object())
    manager.apply_replacements(prompt)
    assert prompt["1"]["class_type"] == OLD_COMPILE and prompt["1"]["inputs"]["verbose"] is True

    monkeypatch.delitem(comfyui_nodes.NODE_CLASS_MAPPINGS, OLD_COMPILE)
    monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, "SpillwayLazyTorchCompile", object())
    prompt["1"]["inputs"] = dict(zip(ORDER, [["2", 0], *STORED], strict=True))
    wanted = dict(prompt["1"]["inputs"])
    manager.apply_replacements(prompt)
    assert (prompt["1"]["class_type"], prompt["1"]["inputs"]) == ("SpillwayLazyTorchCompile", wanted)


def test_a_comfyui_without_such_a_list_is_told_nothing(monkeypatch):
    for running in (None, SimpleNamespace()):
        server = SimpleNamespace(PromptServer=SimpleNamespace(instance=running))
        monkeypatch.setitem(sys.modules, "server", server)
        asyncio.run(tell_of_replacements())


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, {}),
        ({"dynamic": "auto", "log_compile": False}, {"dynamic": None, "log_compile": False}),
        ({"dynamic_shape_tracing": "false", "verbose": False}, {"dynamic": False, "log_compile": False}),
        ({"dynamic_shape_tracing": True, "mode": "default"}, {"dynamic": True}),
        ({"dynamic_shape_tracing": False, "fullgraph": True}, {"dynamic": False, "fullgraph": True}),
    ],
)
def test_both_forms_of_inputs_are_taken_under_the_old_id(values, wanted, checkpoint, monkeypatch):
    """Through ComfyUI's own check of a prompt and its executor."""
    monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, OLD_COMPILE, listed()[OLD_COMPILE])
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    requests = []

    class Give(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="GiveModel", inputs=[], outputs=[io.Model.Output()])

        @classmethod
        def execute(cls):
            return io.NodeOutput(model)

    class Take(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="TakeModel", inputs=[io.Model.Input("model")], outputs=[], is_output_node=True)

        @classmethod
        def execute(cls, model):
            requests.append(model.compile_request)
            return io.NodeOutput()

    for name, node in (("GiveModel", Give), ("TakeModel", Take)):
        monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, name, node)
    prompt = {
        "1": {"class_type": "GiveModel", "inputs": {}},
        "2": {"class_type": OLD_COMPILE, "inputs": {"model": ["1", 0], **values}},
        "3": {"class_type": "TakeModel", "inputs": {"model": ["2", 0]}},
    }
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("prompt", prompt, None))
    assert valid, (error, errors)
    executor = execution.PromptExecutor(
        Server(), execution.CacheType.CLASSIC, {"lru": 1, "ram": 1.0, "ram_inactive": 1.0}
    )
    asyncio.run(executor.execute_async(prompt, "prompt", {}, outputs))
    assert executor.success, executor.status_messages
    assert requests == [CompileRequest(**wanted)]


def test_nothing_is_compiled_before_sampling(checkpoint, caplog):
    caplog.set_level(logging.INFO, "spillway")
    model = as_stored(load_diffusion_model(checkpoint("flux", **SMALL)), dynamic="auto", log_compile=False)
    request = model.compile_request
    assert request == CompileRequest(dynamic=None, log_compile=False)
    assert model.clone().compile_request == request
    assert engine.compile_count() == 0
    assert "disable_dynamic_vram does nothing here" in caplog.text


@pytest.mark.skipif(is_fake(), reason="torch's inductor writes code for a real driver here")
def test_inductor_is_within_its_tolerance(checkpoint):
    """With the values of a workflow file; the C++ code is within its own tolerance of ATen's."""
    path = checkpoint("wan", **ARCHITECTURES["wan"][1])
    wanted = run(load_diffusion_model(path))
    model = as_stored(load_diffusion_model(path))
    got = run(model)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert model.dynamic.ledger.counters.graphs_compiled
    assert said(model, "compiled WanAttentionBlock for 2x")
    assert not said(model, "compile failed")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backend": "cudagraphs"}, "backend cudagraphs replays fixed addresses"),
        ({"backend": "inductor", "mode": "reduce-overhead"}, "mode reduce-overhead uses CUDA graphs"),
        ({"backend": "inductor", "mode": "max-autotune"}, "max-autotune-no-cudagraphs is used"),
        ({"blocks_only": False}, "the whole model as one graph would need all weights at once"),
        ({"cache_size_limit": 0}, "dynamo_cache_size_limit is 0, so nothing is compiled"),
    ],
)
def test_what_is_done_otherwise_is_said(changes, words, checkpoint, monkeypatch):
    monkeypatch.setattr(engine.CompiledFunction, "_call", lambda self, *_: pytest.fail("not here"))
    model = compiled(load_diffusion_model(checkpoint("flux", **SMALL)), **changes)
    model.load(model.load_device)
    assert said(model, words)


def test_the_whole_model_is_compiled_by_blocks(checkpoint):
    path = checkpoint("flux", **SMALL)
    model = compiled(load_diffusion_model(path), blocks_only=False)
    assert_same(run(model), run(load_diffusion_model(path)))
    assert engine.compile_count() == 2


def test_a_backend_that_is_not_there_leaves_the_model_uncompiled(checkpoint, caplog):
    path = checkpoint("flux", **SMALL)
    model = compiled(load_diffusion_model(path), backend="no-such-backend")
    assert_same(run(model), run(load_diffusion_model(path)))
    assert said(model, FAILED)
    assert FAILED in caplog.text and "no-such-backend" in caplog.text
