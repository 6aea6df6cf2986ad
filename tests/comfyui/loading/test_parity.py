"""The pack's loaders give, at every memory budget, bit for bit what ComfyUI's own loaders give with all in memory.

The reference is ComfyUI's classic patcher on the CPU.  Budgets are fractions of what the model takes there; at 0 every
weight is streamed and nothing may stay.
"""

import functools
import gc

import comfy.model_management
import comfy.sd
import comfy.utils
import psutil
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.on_device import comfyuis_dynamic_models
from kit.comfyui.pairs import EACH_FRACTION, assert_same, comfyui_vae
from spillway.ops.vbar.aimdo import PAGE, AimdoVBAR

ARCHES = ("flux", "wan", "lumina2", "z_image")
SEEDS = (0, 1)  # two runs: the second starts with whatever the first left resident
TEXTS = ("a small red house by the sea", "", "an (oil painting:1.3) of [two] foxes, in the manner of a woodcut")
STEPS = 3


@pytest.fixture
def load():
    """The pack's loaders, with a budget in bytes in place of a policy."""
    from spillway.patcher.comfyui.loading import load as comfy_load
    from spillway.patcher.policy import Policy

    class Load:
        @staticmethod
        def diffusion_model(path, budget):
            return comfy_load.load_diffusion_model(path, policy=Policy(vram_bytes=int(budget)))

        @staticmethod
        def checkpoint(path, budget):
            return comfy_load.load_checkpoint(path, policy=Policy(vram_bytes=int(budget)))

        @staticmethod
        def clip(paths, clip_type, budget):
            return comfy_load.load_clip(paths, clip_type, policy=Policy(vram_bytes=int(budget)))

        @staticmethod
        def vae(path, budget):
            return comfy_load.load_vae(path, policy=Policy(vram_bytes=int(budget)))

    return Load


def runs(model, steps=STEPS, size=64):
    return [sampling.sample(model, steps=steps, seed=seed, width=size, height=size) for seed in SEEDS]


@functools.cache
def reference(path, steps=STEPS):
    """(latents of each seed, bytes of the model) by ComfyUI."""
    model = comfy.sd.load_diffusion_model(path)
    latents = runs(model, steps)
    assert all(part.isfinite().all() for part in latents) and not torch.equal(*latents)
    return latents, model.model_size()


def smallest_stay(patcher):
    """The smallest budget that lets a weight stay: comfy-aimdo maps whole pages."""
    return PAGE if isinstance(patcher.dynamic.residency.vbar, AimdoVBAR) else 0


def assert_within(patcher, budget, fraction):
    peak = patcher.dynamic.peak_resident_bytes
    assert peak <= budget, f"{peak} bytes were resident on a budget of {int(budget)}"
    if fraction == 0:
        assert peak == 0
    if fraction == 1 and budget >= smallest_stay(patcher):
        assert peak > 0, "nothing was ever resident, although all of the model may be"


@pytest.mark.parametrize("fraction", EACH_FRACTION)
@pytest.mark.parametrize("arch", ARCHES)
def test_a_diffusion_model_gives_comfyuis_latents_within_its_budget(arch, fraction, checkpoint, load):
    path = checkpoint(arch)
    wanted, size = reference(path)
    model = load.diffusion_model(path, fraction * size)
    assert_same(runs(model), wanted)
    assert_within(model, fraction * size, fraction)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "sizes"), [("lumina2", {"dim": 2304, "layers": 1}), ("z_image", {"dim": 3840, "layers": 0})]
)
def test_a_diffusion_model_of_real_width_gives_comfyuis_latents(arch, sizes, checkpoint, load):
    """These two ComfyUI knows by their width: here it needs no help of the kit to recognise them.

    The small ones of the test before run always.
    """
    if psutil.virtual_memory().available < 8e9:
        pytest.skip("needs 8 GB of free memory")
    path = checkpoint(arch, **sizes)
    wanted, size = reference(path, steps=1)
    reference.cache_clear()
    comfy.model_management.unload_all_models()
    gc.collect()
    model = load.diffusion_model(path, size / 4)
    assert_same(runs(model, steps=1), wanted)
    assert_within(model, size / 4, 0.25)


@functools.cache
def sd15_reference(path):
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(path)
    sizes = [part.model_size() for part in (model, clip.patcher, vae.patcher)]
    return sd15_outputs(model, clip, vae), sizes


def sd15_outputs(model, clip, vae):
    positive, pooled = sampling.text_encode(clip, TEXTS[0])
    negative, _ = sampling.text_encode(clip, TEXTS[1])
    latents = sampling.sample(model, steps=STEPS, cond=([[positive, {}]], [[negative, {}]]))
    picture = sampling.vae_decode(vae, latents / latents.std())
    return positive, pooled, negative, latents, picture, sampling.vae_encode(vae, picture)


@pytest.mark.parametrize("fraction", EACH_FRACTION)
def test_all_parts_of_a_checkpoint_give_comfyuis_outputs(fraction, checkpoint, load):
    """All three parts of one file; the budget is a fraction of the UNet, and each part has one of its own.

    A weight that is merely cast only passes at its first use on a CPU, so the VAE does its part once more.
    """
    path = checkpoint("sd15")
    wanted, sizes = sd15_reference(path)
    budget = fraction * sizes[0]
    model, clip, vae, _ = load.checkpoint(path, budget)
    assert_same(sd15_outputs(model, clip, vae), wanted)
    latents, picture = wanted[3:5]
    assert_same(sampling.vae_decode(vae, latents / latents.std()), picture)
    assert_same(sampling.vae_encode(vae, picture), wanted[5])
    for patcher in (model, clip.patcher, vae.patcher):
        assert_within(patcher, budget, fraction)


def encoded(clip):
    return [part for text in TEXTS for part in sampling.text_encode(clip, text)]


@functools.cache
def clip_reference(path, clip_type):
    with comfyuis_dynamic_models():  # whose embeddings have other bits than its classic ones
        clip = comfy.sd.load_clip([path], clip_type=comfy.sd.CLIPType[clip_type.upper()])
        return encoded(clip), clip.patcher.model_size()


@pytest.mark.parametrize("fraction", EACH_FRACTION)
@pytest.mark.parametrize(("kind", "clip_type"), [("clip_l", "stable_diffusion"), ("t5_base", "stable_audio")])
def test_a_text_encoder_gives_comfyuis_conditioning_within_its_budget(kind, clip_type, fraction, checkpoint, load):
    path = checkpoint(kind)
    wanted, size = clip_reference(path, clip_type)
    clip = load.clip([path], clip_type, fraction * size)
    assert_same(encoded(clip), wanted)
    assert_within(clip.patcher, fraction * size, fraction)


def coded(vae, frames):
    picture = sampling.image(batch=frames)
    latent = sampling.vae_encode(vae, picture)
    return latent, sampling.vae_decode(vae, latent / latent.std()), sampling.vae_encode(vae, picture)


@functools.cache
def vae_reference(path, frames):
    vae = comfyui_vae(path)
    return coded(vae, frames), vae.patcher.model_size()


@pytest.mark.parametrize("fraction", EACH_FRACTION)
@pytest.mark.parametrize(("kind", "frames"), [("sd_vae", 1), ("flux_vae", 1), ("wan_vae", 5)])
def test_a_vae_gives_comfyuis_pictures_within_its_budget(kind, frames, fraction, checkpoint, load):
    path = checkpoint(kind)
    wanted, size = vae_reference(path, frames)
    vae = load.vae(path, fraction * size)
    assert_same(coded(vae, frames), wanted)
    assert_within(vae.patcher, fraction * size, fraction)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_two_models_that_alternate_give_comfyuis_latents(fraction, checkpoint, load):
    paths = [checkpoint("flux"), checkpoint("wan")]
    wanted = [reference(path) for path in paths]
    models = [load.diffusion_model(path, fraction * size) for path, (_, size) in zip(paths, wanted, strict=True)]
    for _ in range(3):
        for model, (latents, _) in zip(models, wanted, strict=True):
            assert_same(runs(model), latents)
    for model, (_, size) in zip(models, wanted, strict=True):
        assert_within(model, fraction * size, fraction)


def test_a_clone_shares_the_weights(checkpoint, load):
    """Nodes clone models freely: a clone runs like its origin, and what both keep stays within one budget."""
    path = checkpoint("flux")
    wanted, size = reference(path)
    model = load.diffusion_model(path, size / 4)
    for one in (model.clone(), model, model.clone().clone()):
        assert_same(runs(one), wanted)
    assert_within(model, size / 4, 0.25)


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.0])
@pytest.mark.parametrize("where", ["between steps", "inside a step"])
def test_an_interrupted_run_leaves_the_next_one_right(where, fraction, checkpoint, load):
    path = checkpoint("wan")
    wanted, size = reference(path)
    model = load.diffusion_model(path, fraction * size)
    steps = []

    def between(step, *_):
        steps.append(step)
        if where == "between steps" and step == 1:
            comfy.model_management.interrupt_current_processing()

    def inside(args, extra):  # after a block of the network, with later weights perhaps on their way
        out = extra["original_block"](args)
        if where == "inside a step" and len(steps) == 1:
            comfy.model_management.interrupt_current_processing()
        return out

    patched = model.clone()
    patched.set_model_patch_replace(inside, "dit", "double_block", 1)
    for _ in range(2):
        steps.clear()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sampling.sample(patched, steps=4, callback=between)
        assert len(steps) == (2 if where == "between steps" else 1)
        assert not comfy.model_management.processing_interrupted()
        assert_same(runs(model), wanted)
    assert_within(model, fraction * size, fraction)


@pytest.mark.parametrize("prompts", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_many_prompts_do_not_grow(prompts, checkpoint, load):
    """Short prompts on two models by turns: after the first 20, memory and open files stay where they are."""
    paths = [checkpoint("flux", hidden=128, depth=1, depth_single=1), checkpoint("wan", dim=128, ffn=256, layers=1)]
    sizes = [comfy.sd.load_diffusion_model(path).model_size() for path in paths]
    models = [load.diffusion_model(path, size / 4) for path, size in zip(paths, sizes, strict=True)]
    process = psutil.Process()
    seen = {}
    for prompt in range(prompts):
        model = models[prompt % 2]
        out = sampling.sample(model, steps=1, seed=prompt, width=32, height=32, cond=sampling.conds(model, seed=prompt))
        assert out.isfinite().all()
        if prompt + 1 in (20, prompts):
            gc.collect()
            files = process.num_handles() if hasattr(process, "num_handles") else process.num_fds()
            seen[prompt + 1] = process.memory_info().rss, files, process.num_threads()
    rss, files, threads = (after - before for before, after in zip(seen[20], seen[prompts], strict=True))
    assert rss < 12e6, f"{rss / 1e6:.1f} MB more than after 20; the models are {sum(sizes) / 1e6:.1f}"
    assert files <= 2 and threads <= 1
