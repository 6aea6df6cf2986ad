"""When hooks change: schedules over one or several sampling nodes, and how often weights are switched for them."""

import itertools

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import nodes as comfyui_nodes
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.hooks import STEPS, hook_lora, hooked, with_hooks
from kit.comfyui.loras import SHAPES, forms, with_lora
from kit.comfyui.pairs import assert_same, counters, pair, run


def schedule(group, *frames):
    """Keyframes on all hooks of a group; frames: (strength, start, guaranteed steps)."""
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start, steps in frames:
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start, guarantee_steps=steps))
    group.set_keyframes_on_hooks(keyframes)
    return group


def in_parts(model, conds, *bounds, steps=8):
    """KSamplerAdvanced nodes in a row, each from one bound to the next; the last one removes what noise is left."""
    latent = {"samples": sampling.empty_latent(model, 32, 32)}
    for start, end in itertools.pairwise(bounds):
        (latent,) = comfyui_nodes.KSamplerAdvanced().sample(
            model,
            "enable" if start == bounds[0] else "disable",
            0,
            steps,
            2.0,
            "euler",
            "normal",
            *conds,
            latent,
            start,
            end,
            "disable" if end == bounds[-1] else "enable",
        )
    return latent["samples"].clone()


FRAMES = {
    "plain": [(0.0, 0.0, 1), (0.5, 0.3, 1), (1.0, 0.7, 1)],
    "guaranteed": [(1.0, 0.0, 3), (0.3, 0.1, 2), (-0.5, 0.2, 2)],
    "not guaranteed": [(1.0, 0.0, 0), (0.6, 0.0, 0), (0.2, 0.5, 0)],
}


@pytest.mark.parametrize("bounds", [(0, 8), (0, 3, 8), (0, 2, 5, 8), (2, 4, 7)], ids=str)
@pytest.mark.parametrize("frames", FRAMES)
def test_a_schedule_over_several_samplers_gives_comfyuis_latents(frames, bounds, flux):
    """A schedule counts in sigmas of the whole run, guaranteed steps in those of each node."""
    classic, ours = pair(flux, 0.25)
    results = []
    for model in (classic, ours):
        group = schedule(hook_lora(), *FRAMES[frames])
        results.append(in_parts(model, with_hooks(model, group), *bounds))
    assert_same(*results)
    assert not torch.equal(results[0], in_parts(classic, with_hooks(classic), *bounds))


def test_guaranteed_steps_count(flux):
    """What the other test compares is not all the same."""
    classic, _ = pair(flux)
    results = [
        in_parts(classic, with_hooks(classic, schedule(hook_lora(), *frames)), 0, 8)
        for frames in (FRAMES["guaranteed"], [(strength, start, 1) for strength, start, _ in FRAMES["guaranteed"]])
    ]
    assert not torch.equal(*results)


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_several_hooks_of_one_condition_keep_their_schedules(fraction, flux):
    """Each with a schedule of its own, on top of a LoRA of the model."""
    classic, ours = (with_lora(model, forms("loha"), 0.5) for model in pair(flux, fraction))
    results = []
    for model in (classic, ours):
        first = schedule(hook_lora("lora"), (1.0, 0.0, 1), (0.2, 0.5, 1))
        second = schedule(hook_lora("diff", 0.3), (0.0, 0.0, 2), (1.0, 0.2, 1))
        results.append(hooked(model, comfy.hooks.HookGroup.combine_all_hooks([first, second])))
    assert_same(*results)


@pytest.mark.parametrize("kind", ["lora", "set"])
def test_a_default_condition_has_hooks_of_its_own(kind, flux):
    """The condition that fills what masks leave has hooks of its own."""
    results = []
    for model in pair(flux, 0.25):
        positive, negative = sampling.conds(model)
        other, _ = sampling.conds(model, seed=8)
        mask = torch.zeros(1, 4, 4)
        mask[:, :, :2] = 0.6
        (masked,) = comfy.hooks.set_conds_props([positive], 1.0, "default", mask=mask, hooks=hook_lora("loha"))
        (both,) = comfy.hooks.set_default_conds_and_combine([masked], [other], hooks=hook_lora(kind))
        results.append(run(model, steps=STEPS, cfg=2.0, cond=(both, negative)))
    assert_same(*results)


# --- how often weights are switched -----------------------------------------------------------------------------------


def switches(model, conds):
    """(patch changes, weights computed) of a run."""
    before = counters(model)
    result = run(model, steps=STEPS, cfg=2.0, cond=conds)
    after = counters(model)
    return after.patch_changes - before.patch_changes, after.patched - before.patched, result


def test_a_hooked_and_a_plain_condition_switch_the_hooked_weights_only(flux):
    """Two switches a step, of the hooked weights only, and no line in the log for each."""
    _, ours = pair(flux, 1.0)
    run(ours)
    before = counters(ours)
    changes, patched, _ = switches(ours, with_hooks(ours, hook_lora()))
    assert changes == 2 * STEPS and patched == STEPS * len(SHAPES)
    touched = sum(b.nbytes for b in ours.dynamic.bundles if any(p.key[: -len(".weight")] in SHAPES for p in b.params))
    loaded = counters(ours).bytes_loaded - before.bytes_loaded
    assert loaded <= 2 * STEPS * touched < ours.dynamic.total_bytes * STEPS
    assert [line for line in ours.dynamic.ledger.decisions if "hooks" in line] == [
        f"hooks change {len(SHAPES)} weights while sampling"
    ]


@pytest.mark.parametrize("how", ["one group", "clones", "two groups of one file"])
def test_conditions_with_the_same_hooks_switch_once(how, flux):
    """The weights are switched once for all steps."""
    classic, ours = pair(flux, 1.0)
    group = hook_lora()
    run(ours)
    other = {"one group": group, "clones": group.clone()}.get(how)
    if other is None:
        other = hook_lora()
        other.hooks[0].weights = group.hooks[0].weights
    conds = with_hooks(ours, group, other)
    changes, patched, result = switches(ours, conds)
    assert changes <= 2 and patched == len(SHAPES)  # on, and off at the end
    assert_same(result, run(classic, steps=STEPS, cfg=2.0, cond=conds))


def test_the_same_hooks_on_all_conditions_are_put_on_once_a_run(flux):
    """Both conditions hooked: nothing was switched in between, so nothing is computed again."""
    _, ours = pair(flux, 1.0)
    group = hook_lora()
    conds = with_hooks(ours, group, group)
    first = switches(ours, conds)
    second = switches(ours, conds)
    assert first[1] == second[1] == len(SHAPES)  # taken off at the end of a run, put on again
    assert_same(second[2], first[2])


@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8_tensorwise", "scaled_fp8"])
def test_hooks_on_a_quantised_file_give_what_the_same_lora_gives(kind, fraction, quantised_file, monkeypatch):
    """ComfyUI cannot do this. Hooks on every condition are to give what the same LoRA on the model gives."""
    # As ComfyUI has it for hooks. A LoRA is computed in 16 bit where the device computes in that.
    monkeypatch.setattr(mm, "lora_compute_dtype", lambda _: torch.float32)
    classic, ours = pair(quantised_file(kind), fraction)
    conds = with_hooks(ours)
    plain = run(ours, steps=STEPS, cfg=2.0, cond=conds)
    group = hook_lora(strength=0.6)
    result = run(ours, steps=STEPS, cfg=2.0, cond=with_hooks(ours, group, group))
    assert not torch.equal(result, plain)
    assert_same(result, run(with_lora(classic, forms("lora"), 0.6), steps=STEPS, cfg=2.0, cond=conds))
    assert_same(run(ours, steps=STEPS, cfg=2.0, cond=conds), plain)
