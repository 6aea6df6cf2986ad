"""ComfyUI's nodes that put a model on another device, or on several. It stays Spillway's, or the log says otherwise.

On a CPU `cpu:1` is the other device. ComfyUI takes it for another one, and its tensors lie where those of `cpu` do.
"""

import comfy.model_management
import comfy.sd
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.dynamic_vram import holds_some
from kit.comfyui.loras import forms, with_lora
from kit.comfyui.pairs import SMALL, assert_alike, assert_same, budget, comfyui_vae, pair, run
from spillway.patcher.comfyui.loading.load import is_ours, load_checkpoint, load_clip, load_diffusion_model, load_vae
from spillway.patcher.policy import Policy

multigpu = pytest.importorskip("comfy_extras.nodes_multigpu", reason="this ComfyUI has no multigpu nodes")
HERE = comfy.model_management.get_torch_device()
OTHER = torch.device(HERE.type, 1)


@pytest.fixture
def two_devices(monkeypatch):
    if HERE.type != "cpu":
        if OTHER not in comfy.model_management.get_all_torch_devices():
            pytest.skip(f"this machine has no {OTHER} to select")
        return
    devices = [torch.device("cpu"), OTHER]
    monkeypatch.setattr(comfy.model_management, "resolve_gpu_device_option", lambda _: OTHER)
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    # A GPU is no 'cpu' for Select Model Device.
    plain = multigpu._apply_patcher_device

    def apply(patcher, resolved, **options):
        multigpu._remember_base_devices(patcher)
        offload = options.get("base_offload_override") or patcher.model._select_base_offload_device
        return multigpu._retarget_patcher(patcher, resolved, offload) if resolved == OTHER else plain(patcher, resolved)

    monkeypatch.setattr(multigpu, "_apply_patcher_device", apply)


@pytest.fixture(params=["file", "checkpoint"])
def ours_and_comfyuis(request, checkpoint):
    """A model of Spillway's on half of its size, and ComfyUI's classic one."""
    if request.param == "file":
        return pair(checkpoint("flux", **SMALL), 0.5)[::-1]
    path = checkpoint("sd15")
    classic = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
    return load_checkpoint(path, budget(classic, 0.5))[0], classic


def sampled(model):
    return run(model, width=64, height=64)


def test_select_model_device_gives_a_dynamic_model_on_the_other_device(ours_and_comfyuis, two_devices):
    ours, classic = ours_and_comfyuis
    wanted = sampled(classic)
    before = sampled(ours)
    moved = multigpu.SelectModelDeviceNode.execute(ours, "gpu:1").args[0]
    assert is_ours(moved) and moved.load_device == OTHER and moved.model is not ours.model
    assert moved.policy == ours.policy
    assert moved.model.spillway_maps  # its weights lie in the file too
    assert_same(before, wanted)
    assert_same(sampled(moved), wanted)
    assert (moved.dynamic.resident_bytes > 0) == holds_some(ours.policy)
    assert moved.dynamic.resident_bytes <= ours.policy.vram_bytes
    assert_same(sampled(ours), wanted)  # the one that came in is as it was


def test_a_lora_goes_with_the_model(checkpoint, two_devices):
    classic, ours = pair(checkpoint("flux", **SMALL), 0.5)
    moved = multigpu.SelectModelDeviceNode.execute(with_lora(ours, forms("lora")), "gpu:1").args[0]
    assert_same(run(moved), run(with_lora(classic, forms("lora"))))


def test_a_text_encoder_and_a_vae_stay_dynamic_on_the_other_device(checkpoint, two_devices):
    path, vae_path = checkpoint("clip_l"), checkpoint("sd_vae")
    clip, vae = load_clip([path]), load_vae(vae_path)
    moved = multigpu.SelectCLIPDeviceNode.execute(clip, "gpu:1").args[0]
    assert is_ours(moved.patcher) and moved.patcher.load_device == OTHER and moved.patcher.model.spillway_maps
    patcher = multigpu._apply_patcher_device(vae.patcher.clone(), OTHER)  # the node refuses what is called cpu
    assert is_ours(patcher) and patcher.load_device == OTHER and patcher.model.spillway_maps
    vae.patcher, vae.first_stage_model, vae.device = patcher, patcher.model, OTHER
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert_same(vae.decode(latent), comfyui_vae(vae_path).decode(latent))


def test_cfg_split_gives_each_device_a_dynamic_model(ours_and_comfyuis, two_devices):
    ours, classic = ours_and_comfyuis
    # Apart, cond and uncond have other bits than in one batch.
    wanted = sampled(multigpu.MultiGPUCFGSplitNode.execute(classic, max_gpus=2).args[0])
    (split,) = multigpu.MultiGPUCFGSplitNode.execute(ours, max_gpus=2).args
    (other,) = split.get_additional_models_with_key("multigpu")
    assert is_ours(split) and is_ours(other)
    assert other.load_device == OTHER and other.model is not split.model and other.policy == ours.policy
    assert other.model.spillway_maps
    assert_same(sampled(split), wanted)


@pytest.mark.parametrize("before", ["fresh", "sampled"])
def test_a_classic_model_that_another_node_asks_for_is_said(before, checkpoint, caplog):
    classic, ours = pair(checkpoint("flux", **SMALL), 0.5)
    wanted = run(ours)
    if before == "fresh":
        ours = load_diffusion_model(checkpoint("flux", **SMALL), policy=Policy(vram_bytes=0))
    caplog.clear()
    given = multigpu._apply_patcher_device(ours.clone(), torch.device("cpu"))
    assert not is_ours(given)
    assert "asked for ComfyUI's own model" in caplog.text and "Spillway does not manage that one" in caplog.text
    assert_alike(run(given), wanted, "cpu")
    assert_same(run(ours), wanted)
    assert any("asked for ComfyUI's own model" in words for words in ours.dynamic.ledger.decisions)
    assert_same(run(classic), wanted)


def test_text_encoders_stay_dynamic_on_the_cpu(checkpoint):
    """ComfyUI asks for a classic patcher, whose module the CLIP would not know."""
    path = checkpoint("clip_l")
    clip = load_clip([path])
    clip.patcher = multigpu._apply_patcher_device(clip.patcher, torch.device("cpu"))
    assert is_ours(clip.patcher)
    wanted = sampling.text_encode(comfy.sd.load_clip([path]), "a house")
    assert_alike(sampling.text_encode(clip, "a house"), wanted, "cpu")
