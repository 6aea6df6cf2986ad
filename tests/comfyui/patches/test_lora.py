"""LoRAs and other weight patches: on the pack's models they give bit for bit what ComfyUI's classic patcher gives."""

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints, sampling
from kit.comfyui.loras import QKV, SHAPES, forms, numbers, with_lora
from kit.comfyui.pairs import EACH_FRACTION, SMALL, assert_same, brought, budget, counters, pair, run
from spillway.patcher.policy import Policy


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "glora", "oft", "diff", "set"])
def test_every_kind_of_lora_gives_comfyuis_latents(kind, flux):
    """What ComfyUI's LoraLoader node makes of each kind of file, at two budgets and two strengths."""
    lora = forms(kind)
    for fraction in (1.0, 0.25):
        classic, ours = pair(flux, fraction)
        plain = run(classic)
        for strength in (1.0, -0.4):
            wanted = run(with_lora(classic, lora, strength))
            assert not torch.equal(wanted, plain)
            assert_same(run(with_lora(ours, lora, strength)), wanted)
        assert_same(run(ours), plain)


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("fraction", EACH_FRACTION)
def test_a_lora_gives_comfyuis_latents_at_any_budget(fraction, weight_dtype, checkpoint, tmp_path):
    """Every matrix patched; in FP8 the patched weights are rounded, and to the same numbers."""
    path = checkpoint("flux", **SMALL)
    lora = comfy.utils.load_torch_file(checkpoints.lora(tmp_path / "lora.safetensors", path))
    classic, ours = pair(path, fraction, weight_dtype)
    plain, wanted = run(classic), run(with_lora(classic, lora, 0.7))
    assert not torch.equal(plain, wanted)
    patched = with_lora(ours, lora, 0.7)
    assert_same(run(patched), wanted)
    assert_same(run(ours), plain)
    assert_same(run(patched), wanted)
    assert ours.dynamic.peak_resident_bytes <= fraction * classic.model_size()


def test_a_stack_of_loras_gives_comfyuis_latents(flux):
    classic, ours = pair(flux, 0.5)
    for kind, strength in (("lora", 0.5), ("loha", 0.25), ("dora", 1.0), ("diff", -0.5), ("lora", 0.3)):
        classic, ours = (with_lora(model, forms(kind), strength) for model in (classic, ours))
    assert_same(run(ours), run(classic))


def test_differences_that_take_turns_give_comfyuis_latents(flux):
    """Two files of the kind `diff`, whose patches are tensors in tuples."""
    classic, ours = pair(flux, 0.5)
    for seed in (1, 2, 1):
        lora = {f"{QKV}.diff": numbers(384, 128, seed=seed, scale=0.1)}
        assert_same(run(with_lora(ours, lora)), run(with_lora(classic, lora)))


def test_a_lora_on_a_convolution_gives_comfyuis_latents(checkpoint, tmp_path):
    """Convolutions have LoRAs of four dimensions."""
    path = checkpoint("sd15_unet", mult=(1,))
    classic, ours = pair(path, 0.5)
    key = "diffusion_model.input_blocks.1.0.in_layers.2"
    lora = {f"{key}.lora_up.weight": numbers(320, 4, 1, 1, scale=0.1), f"{key}.lora_down.weight": numbers(4, 320, 3, 3)}
    plain, wanted = run(classic, steps=1), run(with_lora(classic, lora), steps=1)
    assert not torch.equal(plain, wanted)
    assert_same(run(with_lora(ours, lora), steps=1), wanted)


def test_a_lora_on_a_text_encoder_gives_comfyuis_conditioning(checkpoint):
    """The CLIP half of a LoRA, and the CLIP without it afterwards."""
    from spillway.patcher.comfyui.loading import load as comfy_load

    path = checkpoint("clip_l")
    stem = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj.{}"
    lora = {}
    for layer in (0, 11):
        lora[stem.format(layer, "lora_up.weight")] = numbers(768, 4, seed=layer, scale=0.2)
        lora[stem.format(layer, "lora_down.weight")] = numbers(4, 768, seed=layer, scale=0.2)
    classic = comfy.sd.load_clip([path])
    plain = sampling.text_encode(classic, "a house")
    patched = comfy.sd.load_lora_for_models(None, classic, lora, 0, 0.8)[1]
    wanted = sampling.text_encode(patched, "a house")
    assert not torch.equal(plain[0], wanted[0])
    for fraction in (1.0, 0.0):
        ours = comfy_load.load_clip([path], policy=budget(classic.patcher, fraction))
        for clip, result in ((comfy.sd.load_lora_for_models(None, ours, lora, 0, 0.8)[1], wanted), (ours, plain)):
            assert_same(sampling.text_encode(clip, "a house"), result)


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_clones_with_different_loras_take_turns(fraction, flux):
    """Clones with different LoRAs share one engine and take turns."""
    classic, ours = pair(flux, fraction)
    loras = [None, forms("lora"), forms("diff"), forms("loha")]
    classics, clones = (
        [model if lora is None else with_lora(model, lora) for lora in loras] for model in (classic, ours)
    )
    wanted = [run(model) for model in classics]
    for index in (0, 1, 2, 1, 3, 0, 3, 2):
        assert_same(run(clones[index]), wanted[index])
    assert len({id(clone.dynamic) for clone in clones}) == 1


def test_only_touched_bundles_are_gathered_again(flux):
    classic, ours = pair(flux, 1.0)
    ours.set_policy(Policy())  # on a device of its own, buffers would take a part of the budget
    run(ours)
    everything = ours.dynamic.resident_bytes
    for strength in (1.0, 0.5):
        lora = with_lora(ours, forms("lora"), strength)
        before = counters(ours)
        assert_same(run(lora, steps=3), run(with_lora(classic, forms("lora"), strength), steps=3))
        after = counters(ours)
        assert after.patched - before.patched == len(SHAPES)  # once a weight, not once a step
        loaded = after.bytes_loaded - before.bytes_loaded
        touched = sum(
            brought(ours, b) for b in ours.dynamic.bundles if any(p.key[: -len(".weight")] in SHAPES for p in b.params)
        )
        assert 0 < loaded == touched < everything
    before = counters(ours)
    run(with_lora(ours, forms("lora"), 0.5))  # other objects of the same content: patched again, nothing else
    assert counters(ours).patched - before.patched <= len(SHAPES)
    run(ours)
    before = counters(ours)
    run(ours)
    after = counters(ours)
    assert (after.patched, after.bytes_loaded) == (before.patched, before.bytes_loaded)


@pytest.mark.parametrize("pinned", [0, 1 << 30])
def test_offloaded_patches_are_kept_in_pins(pinned, flux):
    """Without room on the device a patched weight is computed once where pins may hold it, else once a use."""
    classic, ours = pair(flux, 0.0)
    ours = with_lora(ours, forms("lora"))
    ours.set_policy(ours.policy.with_changes(pinned_bytes=pinned))
    assert_same(run(ours, steps=3), run(with_lora(classic, forms("lora")), steps=3))
    assert counters(ours).patched == len(SHAPES) * (1 if pinned else 3)
    assert (ours.pinned_memory_size() > 0) == bool(pinned)


def test_comfyuis_merge_nodes_give_the_same_latents_of_our_models(checkpoint):
    """ComfyUI's merge nodes: the weights of the second model are read where they lie."""
    from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeSimple, ModelSubtract

    paths = [checkpoint("flux", **SMALL), checkpoint("flux", **SMALL, seed=1)]
    (classic, ours), (classic2, ours2) = (pair(path, 0.25) for path in paths)
    second = [with_lora(model, forms("lora"), 0.5) for model in (classic2, ours2)]
    for merge, arguments in ((ModelMergeSimple, (0.3,)), (ModelSubtract, (0.5,)), (ModelAdd, ())):
        wanted, got = (
            getattr(merge(), merge.FUNCTION)(one, other, *arguments)[0]
            for one, other in zip((classic, ours), second, strict=True)
        )
        assert_same(run(got), run(wanted))
    (mixed,) = ModelMergeSimple().merge(ours, classic2, 0.3)
    (wanted,) = ModelMergeSimple().merge(classic, classic2, 0.3)
    assert_same(run(mixed), run(wanted))


@pytest.mark.parametrize("fraction", [1.0, 0.0])
def test_a_weight_wrapper_is_applied_after_loras(fraction, flux):
    """`add_weight_wrapper`: a function of the weight, applied at each use, after LoRAs."""
    classic, ours = pair(flux, fraction)
    results = []
    for model in (classic, ours):
        model = with_lora(model, forms("lora"))
        model.add_weight_wrapper(f"{QKV}.weight", lambda weight: weight * 0.5)
        model.add_weight_wrapper(f"{QKV}.bias", lambda bias: bias + 1)
        results.append(run(model))
    assert_same(*results)
    plain = run(classic)
    assert not torch.equal(results[0], plain)
    assert_same(run(ours), plain)


def test_a_bypass_lora_gives_comfyuis_latents(flux):
    """A LoRA beside the weights instead of in them."""
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRAs")
    classic, ours = pair(flux, 0.25)
    # Its numbers are cast to the dtype of the idle weight, which is the file's here.
    lora = {key: tensor.bfloat16().float() for key, tensor in forms("lora").items()}
    wanted, got = (comfy.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0)[0] for model in (classic, ours))
    assert_same(run(got), run(wanted))
    assert_same(run(ours), run(classic))


@pytest.mark.parametrize("kind", ["reshape_weight", "pad_weight"])
def test_a_patch_may_widen_the_input(kind, flux):
    """Patches that widen the input: ComfyUI reads the new width off the idle weight (Flux' control LoRAs)."""
    wide = 128  # 32 channels in patches of 2 x 2, instead of 16
    lora = {"up": numbers(128, 4, scale=0.2), "down": numbers(4, wide, scale=0.2)}
    results = []
    classic, ours = pair(flux, 0.5)
    for model in (classic, ours):
        if kind == "reshape_weight":
            model = with_lora(
                model,
                {
                    "diffusion_model.img_in.lora_up.weight": lora["up"],
                    "diffusion_model.img_in.lora_down.weight": lora["down"],
                    "diffusion_model.img_in.reshape_weight": torch.tensor([128, wide]),
                },
            )
        else:
            model = model.clone()
            patch = ("diff", (lora["up"] @ lora["down"], {"pad_weight": True}))
            model.add_patches({"diffusion_model.img_in.weight": patch}, 0.5)
        positive, negative = sampling.conds(model)
        for cond in (positive, negative):
            cond[0][1]["concat_latent_image"] = sampling.latent(16, 32, 32)
        results.append(run(model, cond=(positive, negative)))
    assert_same(*results)
    assert_same(run(ours), run(classic))


def test_a_lora_that_fits_nothing_changes_nothing(flux, caplog):
    classic, ours = pair(flux)
    wanted = run(classic)
    patched = with_lora(ours, {"diffusion_model.no_such_layer.lora_up.weight": numbers(4, 4)})
    assert "no_such_layer" in caplog.text
    assert_same(run(patched), wanted)
