"""Models of ComfyUI's own through our node, and other nodes that compile models of ours."""

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
from kit.comfyui.compiling import ARCHITECTURES, FAILED, as_stored, said, with_strength
from kit.comfyui.pairs import SMALL, assert_same, run
from spillway.ops.compile import compiled_function as engine
from spillway.patcher.comfyui.compile.classic_models import CompiledModel, compile_other
from spillway.patcher.comfyui.compile.dynamic_models import CompileRequest
from spillway.patcher.comfyui.loading.adopt import dynamic_model
from spillway.patcher.comfyui.loading.load import is_ours, load_diffusion_model
from spillway.patcher.policy import Policy


def load_classic(path):
    return comfy.sd.load_diffusion_model(path)


# -- models of others


@pytest.mark.parametrize("blocks_only", [True, False])
def test_a_model_of_comfyui_is_compiled_once_for_all_clones(blocks_only, checkpoint):
    path = checkpoint("flux", **SMALL)
    wanted = run(load_classic(path))
    model = compile_other(load_classic(path), CompileRequest(backend="eager", blocks_only=blocks_only), True)
    blocks = list(model.model.diffusion_model.double_blocks)
    for patcher in (model, model.clone()):
        assert_same(run(patcher), wanted)
    graphs = engine.compile_count()
    assert graphs
    assert_same(run(model.clone()), wanted)
    assert engine.compile_count() == graphs
    assert list(model.model.diffusion_model.double_blocks) == blocks


def test_a_model_of_comfyui_runs_uncompiled_where_compiling_fails(checkpoint, caplog):
    path = checkpoint("flux", **SMALL)
    model = compile_other(load_classic(path), CompileRequest(backend="no-such-backend"), True)
    for _ in range(2):
        assert_same(run(model), run(load_classic(path)))
    assert caplog.text.count(FAILED) == 1 and "no-such-backend" in caplog.text


@pytest.mark.parametrize("wanted", [True, False])
def test_the_guard_filter_of_a_model_of_comfyui_saves_compilations(wanted, checkpoint):
    """A UNet's blocks go through all options. With the filter none of them compiles again for one more."""
    path = checkpoint("sd15_unet", **ARCHITECTURES["sd15_unet"][1])
    model = compile_other(load_classic(path), CompileRequest(backend="eager", use_guard_filter=wanted), True)
    counts = []
    for added in ({}, {"of_another_node": "some word"}):
        changed = model.clone()
        changed.model_options["transformer_options"].update(added)
        run(changed)
        counts.append(engine.compile_count())
    assert (counts[0] == counts[1]) == wanted


def test_an_interrupt_is_no_failure(checkpoint, caplog):
    model = compile_other(load_classic(checkpoint("flux", **SMALL)), CompileRequest(backend="eager"), True)
    run(model)

    def stop(*_):
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model, steps=3, callback=stop)
    assert FAILED not in caplog.text


class OldDynamicPatcher(comfy.model_patcher.ModelPatcher):
    """As in versions of ComfyUI that have dynamic models and cannot clone them without it."""

    def is_dynamic(self):
        return True

    def clone(self):
        return super().clone()


def test_a_comfyui_that_cannot_clone_without_dynamic_vram_is_an_error(checkpoint):
    classic = load_classic(checkpoint("flux", **SMALL))
    old = OldDynamicPatcher(classic.model, classic.load_device, classic.offload_device)
    with pytest.raises(
        RuntimeError, match=r"^INT8 Lazy Torch Compile: this ComfyUI version does not support disable_dynamic clone\. "
    ):
        as_stored(old)
    assert isinstance(as_stored(old, disable_dynamic_vram=False), OldDynamicPatcher)


# -- other nodes on models of ours


def test_comfyuis_node_gets_a_classic_model_of_ours(checkpoint):
    """It asks for a classic model and gets one. Its backend for CUDA graphs runs without them on a CPU."""
    path = checkpoint("wan", **ARCHITECTURES["wan"][1])
    ours = load_diffusion_model(path)
    wanted = run(ours)
    (model,) = TorchCompileModel.execute(ours, "cudagraphs").args
    torch.testing.assert_close(run(model), wanted, rtol=1e-4, atol=1e-4)
    assert not model.is_dynamic()
    assert_same(run(ours), wanted)


@pytest.mark.parametrize("keys", [["diffusion_model"], ["diffusion_model.double_blocks.0"]], ids=["whole", "block"])
def test_a_node_that_compiles_our_model_in_place_is_right_and_named(keys, checkpoint, models_dir):
    """As nodes of other packs do. The layers stay outside, so that weights may come, go and change."""
    path = checkpoint("flux", **SMALL)
    lora = comfy.utils.load_torch_file(checkpoints.lora(str(models_dir / "loras" / "in-place.safetensors"), path))
    plain, model = load_diffusion_model(path), load_diffusion_model(path)
    model.set_policy(Policy(vram_bytes=0))
    set_torch_compile_wrapper(model, "eager", keys=keys)
    for strength in (0.0, 0.7):
        assert_same(run(with_strength(model, lora, strength)), run(with_strength(plain, lora, strength)))
    assert said(model, "another node compiles this model")


def test_the_last_node_of_a_chain_compiles(checkpoint):
    """Ours after another: its wrapper goes, in models of ours and of others."""
    path = checkpoint("flux", **SMALL)
    for model in (load_diffusion_model(path), load_classic(path)):
        set_torch_compile_wrapper(model, "eager")
        after = as_stored(model)
        wrappers = after.wrappers["apply_model"].get("torch.compile", [])
        if is_ours(model):  # whose blocks the engine compiles
            assert wrappers == [] and after.compile_request == CompileRequest()
        else:
            assert [type(wrapper) for wrapper in wrappers] == [CompiledModel]


def test_compiled_blocks_put_in_place_take_loras_and_are_named(checkpoint, models_dir, caplog):
    """As an object patch, which would rename the weights inside: a LoRA would miss them."""
    path = checkpoint("flux", **SMALL)
    lora = comfy.utils.load_torch_file(checkpoints.lora(str(models_dir / "loras" / "in-place.safetensors"), path))
    plain, model = load_diffusion_model(path), load_diffusion_model(path).clone()
    classic = comfy.sd.load_diffusion_model(path)
    name = "diffusion_model.double_blocks.0"
    for patcher in (model, classic):
        patcher.add_object_patch(name, torch.compile(patcher.get_model_object(name), backend="eager"))
    for patched in (model, dynamic_model(classic)):
        for strength in (0.0, 0.7):
            assert_same(run(with_strength(patched, lora, strength)), run(with_strength(plain, lora, strength)))
    assert caplog.text.count(f"another node compiles '{name}' in place") == 2
