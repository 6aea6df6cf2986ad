"""The device refuses one allocation of a prompt: ComfyUI's picture or a clear error, and the next prompt is right.

Every 20th of the first 200 allocations here, each of them with `--slow`. With dynamic VRAM on, comfy-aimdo is refused
each page too that it asks the driver for.
"""

import gc
import itertools
import logging
import re

import comfy.model_management as mm
import comfy.ops
import comfy.sd
import pytest
import torch

from cuda_sim.sim import OUT_OF_MEMORY
from kit.comfyui import sampling
from kit.comfyui.on_device import wants_aimdo
from kit.comfyui.pairs import SMALL, assert_same, comfyui_vae
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

FIRST, STRIDE = 200, 20
CLEAR = re.compile("out of memory", re.IGNORECASE)
HALF = Policy(vram_bytes=1 << 20, headroom_bytes=0)  # some weights stay, some are offloaded
ALL = Policy(headroom_bytes=0)  # all weights stay, with dynamic VRAM in pages of comfy-aimdo's
POLICIES = {"half": HALF, "all": ALL}
# Without dynamic VRAM a resident weight takes memory of torch's own, as an offloaded one does: a second witness.
SAMPLED = ["half", "all" if wants_aimdo() else pytest.param("all", marks=pytest.mark.slow)]
PAGE = "cuMemCreate"  # the driver's function that comfy-aimdo gets a page of
SIZE = {"width": 32, "height": 32}


class Flux:
    def __init__(self, checkpoint):
        self.path = checkpoint("flux", **SMALL)

    def core(self):
        return (comfy.sd.load_diffusion_model(self.path),)

    def ours(self, policy):
        return (comfy_load.load_diffusion_model(self.path, policy=policy),)

    @staticmethod
    def prompt(model):
        return (sampling.sample(model, steps=2, **SIZE),)


class Wan:
    """With its video VAE, whose convolutions take frames out of a cache."""

    def __init__(self, checkpoint):
        self.path, self.vae = checkpoint("wan", dim=128, ffn=256, layers=1), checkpoint("wan_vae")

    def core(self):
        return comfy.sd.load_diffusion_model(self.path), comfyui_vae(self.vae)

    def ours(self, policy):
        return comfy_load.load_diffusion_model(self.path, policy=policy), comfy_load.load_vae(self.vae, policy)

    @staticmethod
    def prompt(model, vae):
        latents = sampling.sample(model, steps=1, **SIZE)
        return latents, sampling.vae_decode(vae, latents)


class SD15:
    def __init__(self, checkpoint):
        self.path = checkpoint("sd15", mult=(1,))

    def core(self):
        model, _, vae, _ = comfy.sd.load_checkpoint_guess_config(self.path)
        return model, vae

    def ours(self, policy):
        model, _, vae, _ = comfy_load.load_checkpoint(self.path, policy)
        return model, vae

    @staticmethod
    def prompt(model, vae):
        latents = sampling.sample(model, steps=1, cond=sampling.conds("sd15"), **SIZE)
        return latents, sampling.vae_decode(vae, latents)


def in_slices(vae, latents):
    """Yield what a VAE of ComfyUI's own decodes where its first, its second, ... attention runs out of memory."""
    attention = comfy.ops.scaled_dot_product_attention
    for refused in itertools.count():
        calls = itertools.count()

        def refuse_one(*args, calls=calls, refused=refused, **kwargs):
            if next(calls) == refused:
                raise torch.OutOfMemoryError("out of memory")
            return attention(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(comfy.ops, "scaled_dot_product_attention", refuse_one)
            picture = sampling.vae_decode(vae, latents)
        if next(calls) <= refused:
            return
        yield picture


def held(card):
    gc.collect()
    card.drop_cached()
    return card.memory("used"), card.get("mapped")


def resident(parts):
    return sum(getattr(part, "patcher", part).dynamic.resident_bytes for part in parts)


class Allocations:
    """Of torch's allocator."""

    def __init__(self, card):
        self.card = card

    def refuse(self, number):
        self.before = self.card.memory("refused")
        self.card.fail_at(number)

    def stop(self):
        """Refuse nothing any more. Says whether anything was."""
        self.card.fail_at(0)
        return self.card.memory("refused") > self.before


class Pages:
    """Of comfy-aimdo's VBAR, by the driver."""

    def __init__(self, card):
        self.driver = card.driver

    def refuse(self, number):
        self.driver.fail(PAGE, after=number - 1, error=OUT_OF_MEMORY)

    def stop(self):
        failed = self.driver.failed(PAGE)
        self.driver.fail(PAGE, 0)
        return failed > 0


class Prompts:
    """A graph of ours, and what ComfyUI's own loaders give for it on this device."""

    def __init__(self, kind, checkpoint, card, policy, what=Allocations):
        graph = kind(checkpoint)
        parts = graph.core()
        self.wanted = graph.prompt(*parts)
        self.sliced = list(in_slices(parts[1], self.wanted[0])) if len(parts) > 1 else []
        del parts
        mm.unload_all_models()
        self.graph, self.card, self.what = graph, card, what(card)
        self.parts = graph.ours(policy)
        self.picture()
        assert self.card.get("mapped") or not wants_aimdo() or policy is not ALL
        self.unload()
        self.picture()
        self.unload()
        self.idle = held(card)

    def picture(self):
        assert_same(self.graph.prompt(*self.parts), self.wanted)

    def picture_or_slices(self):
        """Where the attention of a VAE runs out of memory, ComfyUI computes it in slices, which round otherwise."""
        got = self.graph.prompt(*self.parts)
        sliced = [picture for picture in self.sliced if torch.equal(got[1], picture)]
        assert_same(got, (self.wanted[0], *sliced[:1]) if sliced else self.wanted)

    @staticmethod
    def unload():
        mm.unload_all_models()

    def refused(self, number):
        """One prompt from unloaded models on, with its n-th allocation (or page) refused. False where it has fewer.

        After an error a whole prompt follows. After a picture the next number's is the next prompt.
        """
        words = None
        self.what.refuse(number)
        try:
            self.picture_or_slices()
        except (RuntimeError, MemoryError) as error:
            words = f"allocation {number}: {type(error).__name__}: {error}"
        happened = self.what.stop()
        assert words is None or (happened and CLEAR.search(words)), words
        if words is not None:
            self.picture()
        self.unload()
        used, mapped = held(self.card)
        # ComfyUI's own model may have left pages, of which comfy-aimdo takes some where it is refused one.
        assert used == self.idle[0] and mapped <= self.idle[1], f"allocation {number} leaves memory behind"
        self.idle = used, mapped
        assert resident(self.parts) == 0
        return happened

    def sweep(self, numbers):
        """Refuse each of these allocations, in a prompt of its own. A whole prompt ends it."""
        assert all([self.refused(number) for number in numbers]), "the prompt has as many allocations"
        self.picture()


GRAPHS = (Flux, Wan, SD15)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL)


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that most of the time went into waking a second thread for each op."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("policy", SAMPLED)
@pytest.mark.parametrize("kind", GRAPHS)
def test_one_refused_allocation(kind, policy, checkpoint, card):
    Prompts(kind, checkpoint, card, POLICIES[policy]).sweep(range(1, FIRST + 1, STRIDE))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", GRAPHS)
def test_any_refused_allocation(kind, policy, checkpoint, card):
    Prompts(kind, checkpoint, card, POLICIES[policy]).sweep(range(1, FIRST + 1))


@pytest.mark.skipif(not wants_aimdo(), reason="only comfy-aimdo asks the driver for pages")
@pytest.mark.parametrize("kind", GRAPHS)
def test_any_refused_page(kind, checkpoint, card):
    prompts = Prompts(kind, checkpoint, card, ALL, Pages)
    refused = list(itertools.takewhile(prompts.refused, itertools.count(1)))
    assert refused
    prompts.picture()
