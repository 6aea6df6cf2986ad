"""ComfyUI's own readers of weights outside of a layer's call: what they get, what it costs, and what stays behind."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_prefetch
import comfy.ops
import pytest
import torch
from nodes import ControlNetApplyAdvanced

from kit.comfyui import sampling
from kit.comfyui.on_device import weights_at_once
from kit.comfyui.pairs import assert_same, counters, pair, run
from kit.comfyui.quantised import quantised
from kit.nets import same
from kit.sim_device import SimDevice
from spillway.ops.gather import is_wrapper
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy


class Fused(torch.nn.Module):
    """Attention that fuses its norm, an output that is tied, as Z-Image and language models have them."""

    def __init__(self):
        super().__init__()
        ops = comfy.ops.manual_cast
        with weights_at_once():
            self.norm = ops.RMSNorm(64, dtype=torch.bfloat16)
            self.embedding = ops.Linear(64, 256, bias=False, dtype=torch.bfloat16)
        torch.nn.init.normal_(self.norm.weight)
        torch.nn.init.normal_(self.embedding.weight)

    def forward(self, x, fail=False):
        weight, _, token = comfy.ops.cast_bias_weight(self.norm, x, offloadable=True)
        x = torch.nn.functional.rms_norm(x, (64,), weight)
        if fail:
            raise ValueError("between cast and uncast")
        comfy.ops.uncast_bias_weight(self.norm, weight, None, token)
        if not hasattr(comfy.ops, "CastBiasWeightContext"):  # which came after ComfyUI 0.22
            weight, _, token = comfy.ops.cast_bias_weight(self.embedding, x, offloadable=True)
            x = torch.nn.functional.linear(x, weight)
            comfy.ops.uncast_bias_weight(self.embedding, weight, None, token)
            return x
        with comfy.ops.CastBiasWeightContext(self.embedding, x, offloadable=True) as (weight, _):
            return torch.nn.functional.linear(x, weight)


def fused(**policy):
    module = Fused()
    expected = module(torch.ones(2, 64))
    return DynamicModel(module, None, "cpu", Policy(**policy), backend=SimDevice()), expected


@pytest.mark.parametrize("budget", [None, 0])
def test_a_cast_without_a_call_is_a_loan(budget):
    """Resident weights move no bytes after the first time. Others move their own, ahead of their use."""
    model, expected = fused(vram_bytes=budget)
    for _ in range(3):
        assert same(model(torch.ones(2, 64)), expected)
    counters = model.ledger.counters
    moved, brought = counters.bytes_loaded + counters.bytes_streamed, counters.prefetched
    assert same(model(torch.ones(2, 64)), expected)
    moved = counters.bytes_loaded + counters.bytes_streamed - moved
    assert moved == (model.total_bytes if budget == 0 else 0) and counters.reads == 0
    assert [bundle.name for bundle in model.execution_order()] == ["norm", "embedding"]
    assert bool(counters.prefetched - brought) == (budget == 0)
    assert not any(bundle.loan or bundle.depth for bundle in model.bundles)


def test_a_cast_that_is_never_undone_ends_with_its_frame():
    model, expected = fused()
    with pytest.raises(ValueError, match="between cast and uncast"):
        model(torch.ones(2, 64), fail=True)
    assert not any(bundle.loan or bundle.depth for bundle in model.bundles)
    assert same(model(torch.ones(2, 64)), expected) and model.free() >= model.total_bytes


def test_no_queue_is_made_for_layers_that_are_lent(monkeypatch):
    """ComfyUI would capture their work as CUDA graphs, which read the weights' old addresses."""
    card, options = torch.device("cuda:0"), {"prefetch_dynamic_vbars": True}
    monkeypatch.setattr(comfy.model_prefetch.comfy.model_management, "NUM_STREAMS", 2)
    module = Fused()
    make = comfy.model_prefetch.make_prefetch_queue
    assert make([module, [module.norm, module.embedding]], card, options) is not None
    model = DynamicModel(module, None, "cpu", backend=SimDevice())
    assert make([module], card, options) is None
    assert make([[module.norm, module.embedding]], card, options) is None
    model.close()
    assert make([module], card, options) is not None
    comfy.model_prefetch.PREFETCH_QUEUES.clear()


class Plain(torch.nn.Module):
    """A model of torch's own layers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
        self.register_buffer("table", torch.ones(256))

    def forward(self, x):
        return self.layers(x * self.table)


def test_a_model_of_plain_layers_keeps_to_its_budget_and_gives_all_back():
    module = Plain().requires_grad_(False)
    expected = module(torch.ones(1, 256))
    one = 257 * 256 * 4
    model = DynamicModel(module, None, "cpu", Policy(vram_bytes=2 * one, prefetch=0), backend=SimDevice())
    for _ in range(2):
        assert same(model(torch.ones(1, 256)), expected)
    assert model.peak_resident_bytes <= 2 * one
    model.release()
    assert model.resident_bytes == model.buffer_bytes == 0 and model.backend.held() == 0


def control_lora(model, seed=0):
    """A Control-LoRA for the model: its own layers, and low-rank changes of the model's."""
    config = {**model.model.model_config.unet_config, "hint_channels": 3, "operations": comfy.ops.manual_cast}
    config.pop("out_channels")
    control = comfy.cldm.cldm.ControlNet(**config)
    lent = model.model.diffusion_model.state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, tensor in control.state_dict().items():
        if key not in lent:
            weights[key] = torch.randn(tensor.shape, generator=generator) * 0.1
        elif key.endswith("to_q.weight"):
            rows, columns = tensor.shape
            weights[key.replace("weight", "up")] = torch.randn(rows, 4, generator=generator) * 0.1
            weights[key.replace("weight", "down")] = torch.randn(4, columns, generator=generator) * 0.1
    return comfy.controlnet.ControlLora(weights)


def controlled(model, control):
    positive, negative = sampling.conds(model)
    applied = ControlNetApplyAdvanced().apply_controlnet(
        positive, negative, control, sampling.image(32, 32), 1.0, 0.0, 1.0
    )
    return run(model, cond=applied[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_control_lora_borrows_what_the_model_computes_with(dtype, fraction, checkpoint):
    """All of its weights are the model's: in its dtype, with its LoRA, lent at each use."""
    classic, ours = pair(checkpoint("sd15_unet", dtype=dtype), fraction)
    control = control_lora(classic)
    key = "diffusion_model.input_blocks.0.0.weight"
    diff = torch.ones(classic.model.state_dict()[key].shape) * 0.1
    outputs = {}
    for name, model in (("comfyui", classic), ("ours", ours)):
        plain, patched = model, model.clone()
        patched.add_patches({key: (diff,)})
        outputs[name] = [controlled(plain, control), controlled(patched, control), run(patched)]
    assert_same(outputs["ours"], outputs["comfyui"])
    first, second, uncontrolled = outputs["ours"]
    assert not torch.equal(first, second) and not torch.equal(second, uncontrolled)
    # On a CPU, a weight of the right dtype and without a patch is read where it lies.
    assert ours.dynamic.ledger.counters.reads > (100 if dtype is torch.float16 else 0)


@pytest.mark.skipif(not hasattr(comfy.ops, "linear_input_act"), reason="this ComfyUI fuses no activation")
def test_a_fused_activation_takes_its_int8_weight_from_a_loan(checkpoint, tmp_path):
    """Wan's feed forward never calls its last layer. What a step streams is what the file holds, once."""
    base = checkpoint("wan", dim=256, layers=1)
    classic, model = pair(quantised(tmp_path / "int8.safetensors", base, "int8_tensorwise", ("ffn",)), 0.0)
    model.set_policy(model.policy.with_changes(prefetch=0))  # nothing comes ahead for a step that is not made
    assert_same(run(model, 1), run(classic, 1))
    before, forwards = counters(model), []
    hook = model.model.diffusion_model.register_forward_hook(lambda *_: forwards.append(1))
    run(model, 1)
    hook.remove()
    after, dynamic = counters(model), model.dynamic
    fused = [bundle for bundle in dynamic.bundles if bundle.name.endswith(".ffn.2")]
    assert len(fused) == 1 and any(is_wrapper(source) for source in fused[0].source)
    assert fused[0] in dynamic.execution_order()
    asked = sum(bundle.source_bytes for bundle in dynamic.execution_order())
    assert after.bytes_streamed - before.bytes_streamed == len(forwards) * asked > 0
    assert after.reads == before.reads
