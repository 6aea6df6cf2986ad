"""Hooks (LoRAs of single conditions, with masks and keyframes) on the pack's models: latents equal to the classic
patcher's.
"""

import comfy.hooks
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_hooks import SetClipHooks

from kit.comfyui import sampling
from kit.comfyui.hooks import STEPS, hook_lora, hooked
from kit.comfyui.loras import forms, numbers, with_lora
from kit.comfyui.pairs import SMALL, assert_same, budget, pair, run
from spillway.patcher.comfyui.loading import load as comfy_load


def masked(model, groups):
    """Each half of the picture has a condition with a LoRA of its own."""
    positive, negative = sampling.conds(model)
    combined = []
    for half, group in enumerate(groups):
        mask = torch.zeros(1, 4, 4)
        mask[:, :, 2 * half : 2 * half + 2] = 1
        combined += comfy.hooks.set_conds_props([positive], 1.0, "default", mask=mask, hooks=group)[0]
    return run(model, steps=STEPS, cfg=2.0, cond=(combined, negative))


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.0])
def test_a_hooked_lora_gives_comfyuis_latents_and_leaves_the_model_plain(fraction, flux):
    classic, ours = pair(flux, fraction)
    plain, wanted = run(classic, steps=STEPS, cfg=2.0), hooked(classic, hook_lora())
    assert not torch.equal(plain, wanted)
    assert_same(hooked(ours, hook_lora()), wanted)
    assert_same(run(ours, steps=STEPS, cfg=2.0), plain)


def test_keyframes_give_comfyuis_latents(flux):
    frames = [(0.0, 0.0), (0.5, 0.3), (1.0, 0.7)]
    classic, ours = pair(flux, 0.5)
    wanted = hooked(classic, hook_lora(keyframes=frames))
    assert not torch.equal(wanted, hooked(classic, hook_lora()))
    assert_same(hooked(ours, hook_lora(keyframes=frames)), wanted)


def test_masked_conditions_have_loras_of_their_own(flux):
    classic, ours = pair(flux, 0.5)
    wanted = masked(classic, [hook_lora("lora"), hook_lora("loha", 0.5)])
    assert not torch.equal(wanted, masked(classic, [hook_lora("lora"), None]))
    assert_same(masked(ours, [hook_lora("lora"), hook_lora("loha", 0.5)]), wanted)


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
def test_a_hook_comes_on_top_of_the_rounded_lora(weight_dtype, flux):
    """The LoRA is rounded before the hook comes on top of it, as ComfyUI does."""
    classic, ours = (with_lora(model, forms("diff"), 0.5) for model in pair(flux, 0.5, weight_dtype))
    plain = run(classic, steps=STEPS, cfg=2.0)
    assert_same(hooked(ours, hook_lora()), hooked(classic, hook_lora()))
    assert_same(run(ours, steps=STEPS, cfg=2.0), plain)


def test_a_model_as_lora_gives_comfyuis_latents(flux, checkpoint):
    other = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL, seed=1))
    weights = comfy.hooks.get_patch_weights_from_model(other)
    classic, ours = pair(flux, 0.5)
    wanted = hooked(classic, comfy.hooks.create_hook_model_as_lora(weights, None, 0.3, 0))
    assert not torch.equal(wanted, run(classic, steps=STEPS, cfg=2.0))
    assert_same(hooked(ours, comfy.hooks.create_hook_model_as_lora(weights, None, 0.3, 0)), wanted)


def test_hooked_runs_hold_one_copy_of_the_weights(flux):
    """ComfyUI keeps hooked weights beside the plain ones; here one copy changes, within its budget."""
    classic, ours = pair(flux, 0.5)
    peaks = []

    def watch(step, *_):
        peaks.append(ours.dynamic.resident_bytes)
        assert not ours.hook_backup and not ours.cached_hook_patches

    positive, negative = sampling.conds(ours)
    (positive,) = comfy.hooks.set_conds_props([positive], 1.0, "default", hooks=hook_lora())
    run(ours, steps=STEPS, cfg=2.0, cond=(positive, negative), callback=watch)
    assert len(peaks) == STEPS and max(peaks) <= 0.5 * classic.model_size()
    assert ours.get_non_dynamic_delegate() is ours and ours.is_dynamic()


def test_an_interrupt_leaves_no_hook_behind(flux):
    classic, ours = pair(flux, 1.0)
    wanted = run(classic)
    positive, negative = sampling.conds(ours)
    (positive,) = comfy.hooks.set_conds_props([positive], 1.0, "default", hooks=hook_lora())

    def stop(step, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ours, cond=(positive, negative), callback=stop)
    assert_same(run(ours), wanted)


def clip_lora():
    stem = "lora_te_text_model_encoder_layers_3_mlp_fc1"
    return {
        f"{stem}.lora_up.weight": numbers(3072, 4, scale=0.3),
        f"{stem}.lora_down.weight": numbers(4, 768, scale=0.3),
    }


@pytest.mark.parametrize("scheduled", [False, True])
def test_hooks_of_a_text_encoder_give_comfyuis_conditioning(scheduled, checkpoint):
    """Set CLIP Hooks, with one encoding for all steps or one for each keyframe."""
    path = checkpoint("clip_l")
    classic = comfy.sd.load_clip([path])
    ours = comfy_load.load_clip([path], policy=budget(classic.patcher, 0.5))
    results = []
    for clip in (classic, ours):
        group = comfy.hooks.create_hook_lora(clip_lora(), 0, 1.0)
        frames = comfy.hooks.HookKeyframeGroup()
        for factor, start in ((1.0, 0.0), (0.2, 0.5)):
            frames.add(comfy.hooks.HookKeyframe(strength=factor, start_percent=start))
        group.set_keyframes_on_hooks(frames)
        (hooked_clip,) = SetClipHooks().apply_hooks(clip, scheduled, True, group)
        encoded = hooked_clip.encode_from_tokens_scheduled(clip.tokenize("a house"), show_pbar=False)
        assert len(encoded) == (2 if scheduled else 1)
        assert all("hooks" in extra for _, extra in encoded)
        results.append([part.clone() for cond, extra in encoded for part in (cond, extra["pooled_output"])])
        results[-1] += sampling.text_encode(clip, "a house")
    assert_same(*results)
    assert not torch.equal(results[0][0], results[0][-2])
