"""INT8 Lazy Torch Compile: compiled is what uncompiled is, nothing compiles twice, and failing is harmless.

Most of it runs torch's own "eager" backend, which traces and guards like any other and then runs the graph as it is:
its results are the uncompiled ones bit for bit.
"""

import logging

import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.sd
import comfy.utils
import pytest
import torch
import torch._dynamo
import torch._dynamo.utils
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel

from kit.comfyui import checkpoints
from kit.comfyui.pairs import SMALL, assert_same, run
from spillway.nodes.compile import INT8LazyTorchCompile
from spillway.ops.compile import compiled_function as engine
from spillway.patcher.comfyui.compile.dynamic_models import CompiledModel, CompileRequest, compile_other
from spillway.patcher.comfyui.loading.adopt import dynamic_model
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_diffusion_model
from spillway.patcher.policy import Policy

# As a workflow file stores them.
STORED = ["inductor", False, "default", "true", True, 640, True, True, True]
ORDER = [
    "model",
    "backend",
    "fullgraph",
    "mode",
    "dynamic",
    "compile_transformer_blocks_only",
    "dynamo_cache_size_limit",
    "use_guard_filter",
    "disable_dynamic_vram",
    "log_compile",
]
# kinds of blocks in each, and what makes it small
ARCHITECTURES = {
    "flux": (2, {"hidden": 128}),
    "wan": (1, {"dim": 128, "ffn": 128, "layers": 2}),
    "lumina2": (2, {}),
    "sd15_unet": (1, {"mult": (1, 1)}),
}
FAILED = "INT8 Lazy Torch Compile: compile failed; running uncompiled."


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine._recent.clear()


def as_stored(model, **changes):
    """What the node gives for the values of a workflow file, which go to its inputs by position."""
    values = dict(zip(ORDER[1:], STORED, strict=True))
    return INT8LazyTorchCompile.execute(model=model, **{**values, **changes}).args[0]


def compiled(model, **changes):
    """A clone that traces and guards, and runs what was traced as it is."""
    clone = model.clone()
    clone.compile_request = CompileRequest(**{"backend": "eager", **changes})
    return clone


def said(model, text):
    return [line for line in model.dynamic.ledger.decisions if text in line]


def with_lora(model, lora, strength):
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0] if strength else model


def with_budget(model, fraction):
    clone = model.clone()
    clone.set_policy(Policy(vram_bytes=int(model.dynamic.total_bytes * fraction)))
    return clone


# -- the node


def test_inputs_and_defaults():
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


def test_inductor_through_the_node(checkpoint):
    """With the values of a workflow file; the C++ code is within its own tolerance of ATen's."""
    path = checkpoint("wan", **ARCHITECTURES["wan"][1])
    wanted = run(load_diffusion_model(path))
    model = as_stored(load_diffusion_model(path))
    got = run(model)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert model.dynamic.ledger.counters.graphs_compiled
    assert said(model, "compiled WanAttentionBlock for 2x")
    assert not said(model, "compile failed")


# -- models of ours


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_and_no_recompiles(arch, checkpoint, models_dir):
    """Uncompiled bit for bit at any residency, with a LoRA at any strength, at other sizes and batches."""
    kinds, options = ARCHITECTURES[arch]
    if arch == "lumina2":
        checkpoints.accept_small_lumina()
    path = checkpoint(arch, **options)
    lora_path = checkpoints.lora(str(models_dir / "loras" / f"compile-{arch}.safetensors"), path)
    lora = comfy.utils.load_torch_file(lora_path)
    plain = load_diffusion_model(path)
    model = compiled(load_diffusion_model(path))
    for batch in (1, 2):
        assert_same(run(model, batch=batch), run(plain, batch=batch))
    graphs = engine.compile_count()
    assert 0 < graphs <= 4 * kinds
    # (fraction resident, LoRA's strength, size and batch)
    script = [
        (1.0, 0.0, {"width": 64}),
        (0.5, 0.6, {}),
        (0.25, 1.0, {"batch": 3}),
        (0.25, 0.0, {"height": 96, "batch": 2}),
        (0.0, 0.3, {"width": 48, "height": 80}),
        (1.0, 0.3, {}),
    ]
    for fraction, strength, size in script:
        got = run(with_lora(with_budget(model, fraction), lora, strength), **size)
        assert_same(got, run(with_lora(plain, lora, strength), **size))
    assert engine.compile_count() == graphs == model.dynamic.ledger.counters.graphs_compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not said(model, "uncompiled")


def test_a_clone_that_is_not_compiled(checkpoint):
    plain = load_diffusion_model(checkpoint("flux", **SMALL))
    wanted = run(load_diffusion_model(checkpoint("flux", **SMALL)))
    both = compiled(plain)
    assert_same(run(both), wanted)
    graphs = engine.compile_count()
    engine_of_both = plain.state.dynamic
    assert_same(run(plain, batch=2), run(load_diffusion_model(checkpoint("flux", **SMALL)), batch=2))
    assert engine.compile_count() == graphs  # a batch of 2 would have compiled
    assert plain.state.dynamic is engine_of_both
    assert_same(run(both), wanted)
    assert engine.compile_count() == graphs


def test_a_model_that_was_run_before(checkpoint):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    wanted = run(model)
    assert_same(run(compiled(model)), wanted)
    assert engine.compile_count() == 2


def test_an_adopted_model(checkpoint):
    core = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    wanted = run(core)
    assert_same(run(compiled(dynamic_model(core))), wanted)
    assert engine.compile_count() == 2


def test_a_checkpoint_of_fp16(checkpoint):
    path = checkpoint("sd15", mult=(1, 1))
    plain, model = load_checkpoint(path)[0], compiled(load_checkpoint(path)[0])
    assert_same(run(model), run(plain))
    assert engine.compile_count() and not said(model, "uncompiled")


@pytest.fixture
def lora_path(checkpoint, models_dir):
    return checkpoints.lora(str(models_dir / "loras" / "compile-quantised.safetensors"), checkpoint("flux", **SMALL))


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "int8"])
def test_quantised_while_loading(weight_dtype, checkpoint, lora_path):
    check_quantised(checkpoint("flux", **SMALL), weight_dtype, lora_path)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_quantised_files(kind, quantised_file, lora_path):
    """As they are computed with on a CPU: dequantised by layer."""
    check_quantised(quantised_file(kind), "default", lora_path)


def check_quantised(path, weight_dtype, lora_path):
    """The same, in one graph a block, and none more for another budget, size, batch or LoRA."""
    lora = comfy.utils.load_torch_file(lora_path)
    plain = load_diffusion_model(path, weight_dtype)
    model = compiled(load_diffusion_model(path, weight_dtype))
    for batch in (1, 2):
        run(model, batch=batch)
    graphs = engine.compile_count()
    for fraction, strength, size in (
        (1.0, 0.0, {}),
        (0.25, 0.7, {"width": 48}),
        (0.5, 0.4, {"batch": 3}),
        (0.0, 0.0, {}),
    ):
        got = run(with_lora(with_budget(model, fraction), lora, strength), **size)
        assert_same(got, run(with_lora(plain, lora, strength), **size))
    assert engine.compile_count() == graphs == 4
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not said(model, "uncompiled")


def test_quantised_products_that_cannot_be_traced(quantised_file, monkeypatch):
    """FP8 products on a device that has them: torch cannot follow them, so these blocks run as they are."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    path = quantised_file("float8_e4m3fn")
    plain, model = load_diffusion_model(path), compiled(load_diffusion_model(path))
    for size in ({}, {"batch": 2}, {"width": 48}):
        assert_same(run(model, **size), run(plain, **size))
    if torch._dynamo.utils.counters["graph_break"]:
        assert said(model, "its quantised weights (comfy_kitchen) cannot be traced in one piece")


# -- what else is in a graph


def attention_patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
    assert extra_options["block_index"] == 0
    return {"q": q * 1.1, "k": k, "v": v}


def override(attention, *args, **kwargs):
    return attention(*args, **kwargs) * 0.9


def replace(args, extra):
    out = extra["original_block"](args)
    return {**out, "img": out["img"] * 1.01}


PATCHES = {
    "inside": lambda model: model.set_model_attn1_patch(attention_patch),
    "attention": lambda model: model.model_options["transformer_options"].update(
        {"optimized_attention_override": override}
    ),
    "replace": lambda model: model.set_model_patch_replace(replace, "dit", "double_block", 0),
}


@pytest.mark.parametrize("kind", PATCHES)
def test_functions_of_other_nodes_are_obeyed(kind, checkpoint):
    path = checkpoint("flux", **SMALL)
    plain = load_diffusion_model(path)
    bare = run(plain)
    patched, model = plain.clone(), compiled(load_diffusion_model(path))
    for each in (patched, model):
        PATCHES[kind](each)
    wanted = run(patched)
    assert not torch.equal(wanted, bare)
    for _ in range(2):
        assert_same(run(model), wanted)
    assert said(model, "runs uncompiled: a node patches its inside")
    clean = model.clone()
    clean.model_options = plain.clone().model_options
    assert_same(run(clean), bare)
    assert engine.compile_count() == 2


def test_without_the_filter_options_are_guarded(checkpoint):
    path = checkpoint("flux", **SMALL)
    model = compiled(load_diffusion_model(path), use_guard_filter=False)
    assert_same(run(model), run(load_diffusion_model(path)))


def test_interrupt(checkpoint):
    path = checkpoint("flux", **SMALL)
    wanted = run(load_diffusion_model(path))
    model = with_budget(compiled(load_diffusion_model(path)), 0.0)
    run(model)

    def stop(*_):
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, steps=3, callback=stop)
    assert all(bundle.loan is None for bundle in model.dynamic.bundles)
    assert_same(run(model), wanted)
    assert not said(model, "compile failed")


# -- what it is told


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


def test_a_backend_that_is_not_there(checkpoint, caplog):
    path = checkpoint("flux", **SMALL)
    model = compiled(load_diffusion_model(path), backend="no-such-backend")
    assert_same(run(model), run(load_diffusion_model(path)))
    assert said(model, FAILED)
    assert FAILED in caplog.text and "no-such-backend" in caplog.text


# -- models of others


def classic(path):
    return comfy.sd.load_diffusion_model(path)


@pytest.mark.parametrize("blocks_only", [True, False])
def test_a_model_of_the_core(blocks_only, checkpoint):
    path = checkpoint("flux", **SMALL)
    wanted = run(classic(path))
    model = compile_other(classic(path), CompileRequest(backend="eager", blocks_only=blocks_only), True)
    blocks = list(model.model.diffusion_model.double_blocks)
    for patcher in (model, model.clone()):
        assert_same(run(patcher), wanted)
    graphs = engine.compile_count()
    assert graphs
    assert_same(run(model.clone()), wanted)
    assert engine.compile_count() == graphs
    assert list(model.model.diffusion_model.double_blocks) == blocks


def test_a_model_of_the_core_where_compiling_fails(checkpoint, caplog):
    path = checkpoint("flux", **SMALL)
    model = compile_other(classic(path), CompileRequest(backend="no-such-backend"), True)
    for _ in range(2):
        assert_same(run(model), run(classic(path)))
    assert caplog.text.count(FAILED) == 1 and "no-such-backend" in caplog.text


def test_an_interrupt_is_no_failure(checkpoint, caplog):
    model = compile_other(classic(checkpoint("flux", **SMALL)), CompileRequest(backend="eager"), True)
    run(model)

    def stop(*_):
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, steps=3, callback=stop)
    assert FAILED not in caplog.text


class OldDynamicPatcher(comfy.model_patcher.ModelPatcher):
    """As in versions of the core that have dynamic models and cannot clone them without it."""

    def is_dynamic(self):
        return True

    def clone(self):
        return super().clone()


def test_a_core_that_cannot_clone_without_dynamic_vram(checkpoint):
    core = classic(checkpoint("flux", **SMALL))
    old = OldDynamicPatcher(core.model, core.load_device, core.offload_device)
    with pytest.raises(
        RuntimeError, match=r"^INT8 Lazy Torch Compile: this ComfyUI version does not support disable_dynamic clone\. "
    ):
        as_stored(old)
    assert isinstance(as_stored(old, disable_dynamic_vram=False), OldDynamicPatcher)


# -- other nodes on models of ours


def test_the_cores_node_on_our_model(checkpoint):
    """It asks for a classic model and gets one. Its backend for CUDA graphs runs without them on a CPU."""
    path = checkpoint("wan", **ARCHITECTURES["wan"][1])
    ours = load_diffusion_model(path)
    wanted = run(ours)
    (model,) = TorchCompileModel.execute(ours, "cudagraphs").args
    torch.testing.assert_close(run(model), wanted, rtol=1e-4, atol=1e-4)
    assert not model.is_dynamic()
    assert_same(run(ours), wanted)


@pytest.mark.parametrize("keys", [["diffusion_model"], ["diffusion_model.double_blocks.0"]], ids=["whole", "block"])
def test_a_node_that_compiles_our_model_in_place(keys, checkpoint, models_dir):
    """As nodes of other packs do. The layers stay outside, so that weights may come, go and change."""
    path = checkpoint("flux", **SMALL)
    lora = comfy.utils.load_torch_file(checkpoints.lora(str(models_dir / "loras" / "in-place.safetensors"), path))
    plain, model = load_diffusion_model(path), load_diffusion_model(path)
    model.set_policy(Policy(vram_bytes=0))
    set_torch_compile_wrapper(model, "eager", keys=keys)
    for strength in (0.0, 0.7):
        assert_same(run(with_lora(model, lora, strength)), run(with_lora(plain, lora, strength)))
    assert said(model, "another node compiles this model")


def test_the_last_node_of_a_chain_compiles(checkpoint):
    """Ours after another: its wrapper goes, in models of ours and of others."""
    path = checkpoint("flux", **SMALL)
    for model in (load_diffusion_model(path), classic(path)):
        set_torch_compile_wrapper(model, "eager")
        after = as_stored(model)
        wrappers = after.wrappers["apply_model"].get("torch.compile", [])
        assert all(isinstance(wrapper, CompiledModel) for wrapper in wrappers)


def test_a_node_that_puts_compiled_blocks_in_place(checkpoint, models_dir, caplog):
    """As an object patch, which would rename the weights inside: a LoRA would miss them."""
    path = checkpoint("flux", **SMALL)
    lora = comfy.utils.load_torch_file(checkpoints.lora(str(models_dir / "loras" / "in-place.safetensors"), path))
    plain, model = load_diffusion_model(path), load_diffusion_model(path).clone()
    core = comfy.sd.load_diffusion_model(path)
    name = "diffusion_model.double_blocks.0"
    for patcher in (model, core):
        patcher.add_object_patch(name, torch.compile(patcher.get_model_object(name), backend="eager"))
    for patched in (model, dynamic_model(core)):
        for strength in (0.0, 0.7):
            assert_same(run(with_lora(patched, lora, strength)), run(with_lora(plain, lora, strength)))
    assert caplog.text.count(f"another node compiles '{name}' in place") == 2


def test_a_lora_as_side_branch(checkpoint, lora_path):
    """Another kind of weight: its blocks are compiled once more, and not again for another strength."""
    path = checkpoint("flux", **SMALL)
    policy = Policy(int8_lora="side branch")
    lora = comfy.utils.load_torch_file(lora_path)
    plain, model = (load_diffusion_model(path, "int8", policy) for _ in range(2))
    model = compiled(model)
    counts = []
    for strength in (0.0, 0.5, 1.0, 0.0, 0.5):
        assert_same(run(with_lora(model, lora, strength)), run(with_lora(plain, lora, strength)))
        counts.append(engine.compile_count())
    assert counts == [2, 4, 4, 4, 4]
    assert not said(model, "uncompiled")
