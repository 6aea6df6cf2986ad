"""A video VAE whose convolutions take frames out of a cache, with one out-of-memory error anywhere in it."""

import comfy.ops
import pytest
import torch

from kit.comfyui.dynamic_vram import PIECE
from kit.comfyui.pairs import assert_same, budget, comfyui_vae
from spillway.nodes.vae import SpillwayVAEDecode
from spillway.ops.lending.repeat import may_repeat
from spillway.patcher.comfyui.loading import load as comfy_load

FRAMES, SIZE = 4, 4  # of the latent: 13 frames of 32 x 32 pixels


@pytest.fixture
def vaes(checkpoint):
    path = checkpoint("wan_vae")
    core = comfyui_vae(path)
    return core, comfy_load.load_vae(path, budget(core.patcher, 1.0))


class Short:
    """Fails the `after`th call of torch's 3D convolution: its padded copy did not fit."""

    def __init__(self, monkeypatch):
        self.after, self.real = -1, torch.nn.functional.conv3d
        monkeypatch.setattr(torch.nn.functional, "conv3d", self)
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.after:
            raise torch.OutOfMemoryError("simulated: out of memory")
        return self.real(*args, **kwargs)

    def at(self, after):
        self.after, self.calls = after, 0


def latent():
    return torch.randn(1, 16, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def test_one_out_of_memory_gives_the_frames_or_raises(vaes, monkeypatch):
    """Never other frames: a convolution run again would find its cache empty."""
    core, ours = vaes
    z = latent().to(ours.device, ours.vae_dtype)
    core.decode(latent())  # loads it
    wanted, short = core.first_stage_model.decode(z), Short(monkeypatch)
    ours.decode(latent())
    short.at(0)
    assert_same(ours.first_stage_model.decode(z), wanted)
    calls, raised = short.calls, 0
    assert calls > 40
    own = max(PIECE, *(bundle.nbytes for bundle in ours.patcher.dynamic.bundles))
    for after in range(1, calls + 1, 7):
        short.at(after)
        try:
            assert_same(ours.first_stage_model.decode(z), wanted)
        except torch.OutOfMemoryError:
            raised += 1
            assert ours.patcher.loaded_size() <= own, "room was made for the next try, by all but the layer itself"
        short.at(0)
        assert_same(ours.first_stage_model.decode(z), wanted)
    assert raised


@pytest.mark.parametrize("times", [1, 2])
def test_the_node_decodes_anew(vaes, monkeypatch, times):
    """After an eviction it starts from the latent, with nothing of the first try in any cache."""
    core, ours = vaes
    wanted = core.decode(latent())
    short = Short(monkeypatch)
    short.at(0)
    ours.decode(latent())
    short.at(short.calls - 20)
    images, how = SpillwayVAEDecode.execute({"samples": latent()}, ours, 64).result
    assert how.startswith("plain, after") and short.calls > short.after
    assert_same(images, wanted.reshape(images.shape))


def test_which_of_comfyuis_layers_are_repeated(vaes):
    """Its own op classes are, what an architecture derives from them is not."""
    _, ours = vaes
    kinds = {}
    for module in ours.first_stage_model.modules():
        if module._parameters:
            kinds[type(module).__name__] = may_repeat(module)
    assert kinds["CausalConv3d"] is False and kinds["Conv2d"] is True
    mixed = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    assert may_repeat(mixed.Linear(4, 4)) and may_repeat(comfy.ops.manual_cast.Linear(4, 4))
