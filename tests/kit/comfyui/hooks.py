"""Hooks of conditions, and runs of a model with them."""

import comfy.hooks

from kit.comfyui import sampling
from kit.comfyui.loras import forms
from kit.comfyui.pairs import run

STEPS = 4


def hook_lora(kind="lora", strength=1.0, keyframes=()):
    """Make a group of one hook; keyframes: (strength, start) pairs."""
    group = comfy.hooks.create_hook_lora(forms(kind), strength, strength)
    if keyframes:
        frames = comfy.hooks.HookKeyframeGroup()
        for factor, start in keyframes:
            frames.add(comfy.hooks.HookKeyframe(strength=factor, start_percent=start))
        group.set_keyframes_on_hooks(frames)
    return group


def hooked(model, group, **options):
    """Sample with hooks on the positive condition, as Cond Set Props attaches them; cfg makes the negative count."""
    positive, negative = sampling.conds(model)
    (positive,) = comfy.hooks.set_conds_props([positive], 1.0, "default", hooks=group, **options)
    return run(model, steps=STEPS, cfg=2.0, cond=(positive, negative))


def with_hooks(model, positive=None, negative=None):
    conds = list(sampling.conds(model))
    for place, group in enumerate((positive, negative)):
        if group is not None:
            (conds[place],) = comfy.hooks.set_conds_props([conds[place]], 1.0, "default", hooks=group)
    return tuple(conds)
