"""The node INT8 Lazy Torch Compile: its inputs, and what it says where it does otherwise than asked."""

import logging

import pytest
import torch
import torch._dynamo
import torch._dynamo.utils

from kit.comfyui.compiling import ARCHITECTURES, FAILED, ORDER, STORED, as_stored, compiled, said
from kit.comfyui.pairs import SMALL, assert_same, run
from spillway.nodes.compile import INT8LazyTorchCompile
from spillway.ops.compile import compiled_function as engine
from spillway.patcher.comfyui.compile.dynamic_models import CompileRequest
from spillway.patcher.comfyui.loading.load import load_diffusion_model


def test_inputs_and_defaults_are_those_of_stored_workflows():
    schema = INT8LazyTorchCompile.define_schema()
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
    assert schema.node_id == "INT8LazyTorchCompile"


def test_nothing_is_compiled_before_sampling(checkpoint, caplog):
    caplog.set_level(logging.INFO, "spillway")
    model = as_stored(load_diffusion_model(checkpoint("flux", **SMALL)), dynamic="auto", log_compile=False)
    request = model.compile_request
    assert request == CompileRequest(dynamic=None, log_compile=False)
    assert model.clone().compile_request == request
    assert engine.compile_count() == 0
    assert "disable_dynamic_vram does nothing here" in caplog.text


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
