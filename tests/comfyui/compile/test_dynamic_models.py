"""Compiled models of ours: what uncompiled ones give, and nothing compiles twice.

Most tests run torch's own "eager" backend, which traces and guards like any other and then runs the graph as it is. Its
results are the uncompiled ones bit for bit.
"""

import comfy.model_management
import comfy.model_patcher
import comfy.quant_ops
import comfy.sd
import comfy.utils
import pytest
import torch
import torch._dynamo
import torch._dynamo.utils

from kit.comfyui import checkpoints
from kit.comfyui.compiling import ARCHITECTURES, compiled, said, with_budget, with_strength
from kit.comfyui.pairs import SMALL, assert_same, run
from spillway.ops.compile import compiled_function as engine
from spillway.patcher.comfyui.loading.adopt import dynamic_model
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_diffusion_model
from spillway.patcher.policy import Policy


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_compiled_model_gives_the_same_latents_and_never_recompiles(arch, checkpoint, models_dir):
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
        got = run(with_strength(with_budget(model, fraction), lora, strength), **size)
        assert_same(got, run(with_strength(plain, lora, strength), **size))
    assert engine.compile_count() == graphs == model.dynamic.ledger.counters.graphs_compiled
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not said(model, "uncompiled")


def test_a_clone_that_is_not_compiled_stays_uncompiled(checkpoint):
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


def test_a_model_that_was_run_before_is_compiled(checkpoint):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    wanted = run(model)
    assert_same(run(compiled(model)), wanted)
    assert engine.compile_count() == 2


def test_an_adopted_model_is_compiled(checkpoint):
    classic = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))
    wanted = run(classic)
    assert_same(run(compiled(dynamic_model(classic))), wanted)
    assert engine.compile_count() == 2


def test_a_checkpoint_of_fp16_is_compiled(checkpoint):
    path = checkpoint("sd15", mult=(1, 1))
    plain, model = load_checkpoint(path)[0], compiled(load_checkpoint(path)[0])
    assert_same(run(model), run(plain))
    assert engine.compile_count() and not said(model, "uncompiled")


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "int8"])
def test_a_model_quantised_while_loading_never_recompiles(weight_dtype, checkpoint, lora_path):
    check_quantised(checkpoint("flux", **SMALL), weight_dtype, lora_path)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise"])
def test_a_quantised_file_never_recompiles(kind, quantised_file, lora_path, monkeypatch):
    """As they are computed with on a CPU, and on a device without FP8 products: dequantised by layer."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: False)
    check_quantised(quantised_file(kind), "default", lora_path)


def check_quantised(path, weight_dtype, lora_path):
    """The same, in one graph a block, and none more for another budget, size, batch or LoRA.

    CUDA multiplies in INT8 from 17 rows on. Below, rows are padded, another graph. There each size runs before.
    """
    lora = comfy.utils.load_torch_file(lora_path)
    plain = load_diffusion_model(path, weight_dtype)
    model = compiled(load_diffusion_model(path, weight_dtype))
    on_a_cpu = model.load_device.type == "cpu"
    for size in ({}, {"batch": 2}, *(() if on_a_cpu else ({"width": 48}, {"batch": 3}))):
        run(model, **size)
    graphs = engine.compile_count()
    for fraction, strength, size in (
        (1.0, 0.0, {}),
        (0.25, 0.7, {"width": 48}),
        (0.5, 0.4, {"batch": 3}),
        (0.0, 0.0, {}),
    ):
        got = run(with_strength(with_budget(model, fraction), lora, strength), **size)
        assert_same(got, run(with_strength(plain, lora, strength), **size))
    assert engine.compile_count() == graphs and graphs in ({4} if on_a_cpu else range(4, 9))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not said(model, "uncompiled")


def test_blocks_whose_quantised_products_cannot_be_traced_run_uncompiled(quantised_file, monkeypatch):
    """FP8 products on a device that has them: torch cannot follow them, so these blocks run as they are."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    path = quantised_file("float8_e4m3fn")
    plain, model = load_diffusion_model(path), compiled(load_diffusion_model(path))
    for size in ({}, {"batch": 2}, {"width": 48}):
        assert_same(run(model, **size), run(plain, **size))
    assert torch._dynamo.utils.counters["graph_break"]
    assert said(model, "its quantised weights (comfy_kitchen) cannot be traced in one piece")


def test_a_lora_as_side_branch_compiles_once_more(checkpoint, lora_path):
    """Another kind of weight: its blocks are compiled once more, and not again for another strength."""
    path = checkpoint("flux", **SMALL)
    policy = Policy(int8_lora="side branch")
    lora = comfy.utils.load_torch_file(lora_path)
    plain, model = (load_diffusion_model(path, "int8", policy) for _ in range(2))
    model = compiled(model)
    counts = []
    for strength in (0.0, 0.5, 1.0, 0.0, 0.5):
        assert_same(run(with_strength(model, lora, strength)), run(with_strength(plain, lora, strength)))
        counts.append(engine.compile_count())
    assert counts == [2, 4, 4, 4, 4]
    assert not said(model, "uncompiled")


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


@pytest.mark.parametrize(("wanted", "graphs"), [(True, 1), (False, 4)])
def test_the_guard_filter_saves_compilations_and_changes_no_latent(wanted, graphs, checkpoint):
    """A UNet's block reads all options, its own number too. With the filter blocks of a kind share a graph."""
    path = checkpoint("sd15_unet", **ARCHITECTURES["sd15_unet"][1])
    model = compiled(load_diffusion_model(path), use_guard_filter=wanted)
    assert_same(run(model), run(load_diffusion_model(path)))
    assert engine.compile_count() == graphs


def test_an_interrupt_gives_the_loans_back(checkpoint):
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
