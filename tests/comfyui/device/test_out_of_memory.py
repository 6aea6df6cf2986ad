"""The device refuses one allocation of a prompt: ComfyUI's picture or a clear error, and the next prompt is right.

Every 20th of the first 200 allocations here, each of them with `--slow`.
"""

import gc
import logging
import re

import comfy.model_management as mm
import comfy.sd
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.pairs import SMALL, assert_same, comfyui_vae
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

FIRST, STRIDE = 200, 20
CLEAR = re.compile("out of memory", re.IGNORECASE)
HALF = Policy(vram_bytes=1 << 20, headroom_bytes=0)  # some weights stay, some are offloaded
SIZE = {"width": 32, "height": 32}


class Flux:
    def __init__(self, checkpoint):
        self.path = checkpoint("flux", **SMALL)

    def core(self):
        return (comfy.sd.load_diffusion_model(self.path),)

    def ours(self):
        return (comfy_load.load_diffusion_model(self.path, policy=HALF),)

    @staticmethod
    def prompt(model):
        return (sampling.sample(model, steps=2, **SIZE),)


class Wan:
    """With its video VAE, whose convolutions take frames out of a cache."""

    def __init__(self, checkpoint):
        self.path, self.vae = checkpoint("wan", dim=128, ffn=256, layers=1), checkpoint("wan_vae")

    def core(self):
        return comfy.sd.load_diffusion_model(self.path), comfyui_vae(self.vae)

    def ours(self):
        return comfy_load.load_diffusion_model(self.path, policy=HALF), comfy_load.load_vae(self.vae, HALF)

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

    def ours(self):
        model, _, vae, _ = comfy_load.load_checkpoint(self.path, HALF)
        return model, vae

    @staticmethod
    def prompt(model, vae):
        latents = sampling.sample(model, steps=1, cond=sampling.conds("sd15"), **SIZE)
        return latents, sampling.vae_decode(vae, latents)


def held(card):
    gc.collect()
    card.drop_cached()
    return card.memory("used"), card.get("mapped")


class Prompts:
    """A graph of ours, and what ComfyUI's own loaders give for it on this device."""

    def __init__(self, kind, checkpoint, card):
        graph = kind(checkpoint)
        parts = graph.core()
        self.wanted = graph.prompt(*parts)
        del parts
        mm.unload_all_models()
        self.graph, self.card = graph, card
        self.parts = graph.ours()
        self.picture()
        self.unload()
        self.picture()
        self.unload()
        self.idle = held(card)

    def picture(self):
        assert_same(self.graph.prompt(*self.parts), self.wanted)

    @staticmethod
    def unload():
        mm.unload_all_models()

    def refused(self, number):
        """One prompt from unloaded models on, with its n-th allocation refused. False where it has fewer.

        After an error a whole prompt follows. After a picture the next number's is the next prompt.
        """
        before = self.card.memory("refused")
        self.card.fail_at(number)
        words = None
        try:
            self.picture()
        except (RuntimeError, MemoryError) as error:
            words = f"allocation {number}: {type(error).__name__}: {error}"
        self.card.fail_at(0)
        happened = self.card.memory("refused") > before
        assert words is None or (happened and CLEAR.search(words)), words
        if words is not None:
            self.picture()
        self.unload()
        assert held(self.card) == self.idle, f"allocation {number} leaves memory behind"
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


@pytest.mark.parametrize("kind", GRAPHS)
def test_one_refused_allocation(kind, checkpoint, card):
    Prompts(kind, checkpoint, card).sweep(range(1, FIRST + 1, STRIDE))


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRAPHS)
def test_any_refused_allocation(kind, checkpoint, card):
    Prompts(kind, checkpoint, card).sweep(range(1, FIRST + 1))
