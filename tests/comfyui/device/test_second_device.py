"""Models on a second device, beside or instead of the first: the pictures are those of ComfyUI's own loaders there."""

import comfy.sd
import pytest
import torch

from kit.comfyui.loras import forms, with_lora
from kit.comfyui.pairs import assert_same, budget, pair, run
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

nodes = pytest.importorskip("comfy_extras.nodes_multigpu", reason="this ComfyUI selects no devices")
SECOND = torch.device("cuda", 1)


def selected(model, device):
    return nodes.SelectModelDeviceNode.execute(model, device).result[0]


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_select_model_device(card, flux, fraction):
    core, ours = pair(flux, fraction)
    wanted = run(selected(core, "gpu:1"))
    used = card.memory("used", 0)
    there = selected(ours, "gpu:1")
    card.library.fake_reset_peak(0)
    assert_same(run(there), wanted)
    assert there.load_device == SECOND == there.dynamic.device
    assert card.memory("peak", 0) - used < there.model_size() // 2, "no weight went over the first device"
    assert_same(run(ours), run(core))
    assert_same(run(selected(there, "default")), run(core))


def test_a_lora_goes_along(card, flux):
    core, ours = pair(flux, 0.5)
    wanted = run(selected(with_lora(core, forms("lora")), "gpu:1"))
    assert_same(run(selected(with_lora(ours, forms("lora")), "gpu:1")), wanted)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_cfg_split_over_two_devices(card, checkpoint, cfg):
    """Both halves of a batch, each on a device of its own."""
    path = checkpoint("wan", dim=128, ffn=256, layers=1)
    core = comfy.sd.load_diffusion_model(path)
    ours = comfy_load.load_diffusion_model(path, policy=budget(core, 0.5))
    wanted = run(nodes.MultiGPUCFGSplitNode.execute(core, 2).result[0], cfg=cfg)
    split = nodes.MultiGPUCFGSplitNode.execute(ours, 2).result[0]
    for _ in range(2):
        assert_same(run(split, cfg=cfg), wanted)
    assert_same(run(ours, cfg=cfg), run(core, cfg=cfg))


def test_the_second_device_has_a_budget_of_its_own(card, flux):
    """A full first device says nothing about it."""
    core = comfy.sd.load_diffusion_model(flux)
    wanted = run(selected(core, "gpu:1"))
    ours = selected(comfy_load.load_diffusion_model(flux, policy=Policy(headroom_bytes=0)), "gpu:1")
    with card.room(0):
        assert_same(run(ours), wanted)
