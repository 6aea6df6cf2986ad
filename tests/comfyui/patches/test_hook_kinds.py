"""Hooks that are no LoRAs (wrappers, patches, models), their scope, and hooks that fail in the middle of a step."""

import gc
import weakref

import comfy.hooks
import comfy.model_management as mm
import comfy.patcher_extension
import comfy.sd
import pytest
import torch
from comfy.hooks import EnumHookScope
from comfy.patcher_extension import WrappersMP

from kit.comfyui.hooks import STEPS, hook_lora, with_hooks
from kit.comfyui.loras import SHAPES
from kit.comfyui.pairs import SMALL, assert_same, counters, pair, run
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy


def wrapper_hook(kind, wrapper, scope=EnumHookScope.HookedOnly):
    options = {}
    comfy.patcher_extension.add_wrapper_with_key(kind, "test", wrapper, options)
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook(options, hook_scope=scope))
    return group


def sampled(model, positive=None, negative=None):
    return run(model, steps=STEPS, cfg=2.0, cond=with_hooks(model, positive, negative))


@pytest.mark.parametrize("scope", EnumHookScope)
@pytest.mark.parametrize("kind", [WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL])
def test_a_wrapper_hook_wraps_what_its_scope_says(kind, scope, flux):
    """A wrapper of one condition, or by its scope of all; beside a LoRA hook of the same condition."""
    classic, ours = pair(flux, 0.25)
    results = []
    for model in (classic, ours):
        calls = []

        def wrapper(executor, x, *args, calls=calls, **kwargs):
            calls.append(tuple(x.shape))
            return executor(x * 0.9, *args, **kwargs)

        group = comfy.hooks.HookGroup.combine_all_hooks([wrapper_hook(kind, wrapper, scope), hook_lora()])
        results.append((sampled(model, group), calls))
        assert not model.wrappers.get(kind)
        before = len(calls)
        run(model, steps=1)
        assert len(calls) == before
    assert_same(results[1][0], results[0][0])
    assert results[1][1] == results[0][1]
    assert len(results[0][1]) == STEPS * (1 if scope is EnumHookScope.HookedOnly else 2)
    assert not torch.equal(results[0][0], sampled(classic, hook_lora()))


@pytest.mark.parametrize("scope", EnumHookScope)
def test_transformer_options_of_a_hook_reach_what_its_scope_says(scope, flux):
    """A patch of a block, as attention and block patches are hooked."""
    classic, ours = pair(flux, 0.25)
    results = []
    for model in (classic, ours):

        def block(args, extra):
            out = extra["original_block"](args)
            out["img"] = out["img"] * 1.1
            return out

        options = {"patches_replace": {"dit": {("double_block", 0): block}}}
        group = comfy.hooks.HookGroup()
        group.add(comfy.hooks.TransformerOptionsHook(options, hook_scope=scope))
        results.append(sampled(model, group))
    assert_same(*results)
    assert not torch.equal(results[0], sampled(classic))


@pytest.mark.parametrize("ours_too", [False, True])
def test_models_that_a_hook_brings_are_loaded(ours_too, flux, checkpoint):
    """A model that a hook brings is loaded for the run, and used by the hook's wrapper; of ComfyUI's or of ours."""
    classic, ours = pair(flux, 0.25)
    path = checkpoint("flux", **SMALL, seed=1)
    results = []
    for model in (classic, ours):
        helper = comfy.sd.load_diffusion_model(path)
        if ours_too and model is ours:
            helper = comfy_load.load_diffusion_model(path, policy=Policy(vram_bytes=1 << 20))
        loaded = []

        def wrapper(executor, x, t, context, y=None, *args, helper=helper, loaded=loaded, **kwargs):
            loaded.append(any(entry.model is helper for entry in mm.current_loaded_models))
            other = helper.model.diffusion_model(x, t, context, y, kwargs.get("guidance", args[0] if args else None))
            return executor(x, t, context, y, *args, **kwargs) + 0.1 * other

        group = comfy.hooks.HookGroup.combine_all_hooks(
            [wrapper_hook(WrappersMP.DIFFUSION_MODEL, wrapper), hook_lora("loha", 0.5)]
        )
        group = group.clone()
        group.add(comfy.hooks.AdditionalModelsHook([helper], "helper"))
        results.append(sampled(model, group))
        assert loaded == [True] * STEPS
        if ours_too and model is ours:
            counted = helper.dynamic.ledger.counters
            assert helper.dynamic.peak_resident_bytes <= 1 << 20 and counted.faults + counted.misses > 0
    assert_same(*results)
    assert not torch.equal(results[0], sampled(classic, hook_lora("loha", 0.5)))


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_a_model_of_ours_as_lora_gives_comfyuis_latents(fraction, flux, checkpoint):
    """The weights of one dynamic model, read where they lie, as a hook of another."""
    other = checkpoint("flux", **SMALL, seed=1)
    results = []
    for model, helper in zip(pair(flux, fraction), pair(other, fraction), strict=True):
        weights = comfy.hooks.get_patch_weights_from_model(helper)
        results.append(sampled(model, comfy.hooks.create_hook_model_as_lora(weights, None, 0.3, 0)))
    assert_same(*results)


# --- failing ----------------------------------------------------------------------------------------------------------


class Trouble(Exception):
    pass


def failing(how, at, model):
    """A hook whose wrapper fails at its `at`th call, after the weights of the condition were used."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        out = executor(*args, **kwargs)
        calls.append(None)
        if len(calls) == at:
            assert model.state.patches  # the hook's weights are on
            if how == "raises":
                raise Trouble
            mm.interrupt_current_processing()
            mm.throw_exception_if_processing_interrupted()
        return out

    return wrapper_hook(WrappersMP.DIFFUSION_MODEL, wrapper)


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("how", ["raises", "interrupted"])
def test_a_hook_that_fails_in_the_middle_of_a_step_leaves_nothing_behind(how, fraction, flux):
    """With its weights on. The next run, with and without hooks, is right; nothing stays behind."""
    classic, ours = pair(flux, fraction)
    plain, wanted = sampled(classic), sampled(classic, hook_lora())
    for at in (1, 2):
        group = comfy.hooks.HookGroup.combine_all_hooks([hook_lora("diff"), failing(how, at, ours)])
        tensors = [weakref.ref(t) for t in group.get_type(comfy.hooks.EnumHookType.Weight)[0].weights.values()]
        with pytest.raises(Trouble if how == "raises" else mm.InterruptProcessingException):
            sampled(ours, group)
        assert all(bundle.loan is None and not bundle.depth for bundle in ours.dynamic.bundles)
        del group
        assert_same(sampled(ours), plain)
        assert not ours.state.patches and not ours.current_hooks and not ours.hook_patches
        gc.collect()
        assert not [t for t in tensors if t() is not None]
        assert_same(sampled(ours, hook_lora()), wanted)
    other = ours.clone()
    with pytest.raises(Trouble if how == "raises" else mm.InterruptProcessingException):
        sampled(ours, comfy.hooks.HookGroup.combine_all_hooks([hook_lora("diff"), failing(how, 2, ours)]))
    assert_same(sampled(other), plain)  # a clone that never heard of the hook


def test_a_patch_that_raises_leaves_the_next_run_right(flux, monkeypatch):
    """In the arithmetic of a hook's LoRA: the error comes out, and the bundle is not taken for a finished one."""
    import comfy.lora

    classic, ours = pair(flux, 0.0)
    ours.set_policy(ours.policy.with_changes(pinned_bytes=1 << 30))
    plain, wanted = sampled(classic), sampled(classic, hook_lora())
    calculate, calls = comfy.lora.calculate_weight, []

    def once(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise Trouble
        return calculate(*args, **kwargs)

    monkeypatch.setattr(comfy.lora, "calculate_weight", once)
    with pytest.raises(Trouble):
        sampled(ours, hook_lora())
    assert_same(sampled(ours, hook_lora()), wanted)
    assert_same(sampled(ours), plain)
    before = counters(ours)
    sampled(ours)
    assert counters(ours).patched == before.patched


def test_the_weights_are_the_files_again_after_a_hooked_run(flux):
    """After hooks the model can be saved: idle weights are those of the file."""
    classic, ours = pair(flux, 0.25)
    sampled(ours, hook_lora())
    saved, wanted = ours.model_state_dict_for_saving(), classic.model_state_dict_for_saving()
    for stem in SHAPES:
        key = f"{stem}.weight"
        assert torch.equal(torch.as_tensor(saved[key]).float(), torch.as_tensor(wanted[key]).float())
