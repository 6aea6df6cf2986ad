"""Seamless tiling: bit for bit a plain model with circular padding, at any budget, and undone without a trace."""

import copy

import comfy.model_management as mm
import comfy.sd
import pytest
import torch
import torch.nn.functional as F

from kit.comfyui import sampling
from kit.comfyui.pairs import assert_same, budget, comfyui_vae, run
from spillway.nodes.tiling import SpillwaySeamlessTiling
from spillway.patcher.comfyui.loading.load import load_diffusion_model, load_vae
from spillway.patcher.comfyui.patches.tiling import AXES, METHOD, convolutions


def made_circular(model, axes):
    """Change a plain model's own convolutions: both axes by torch's own padding mode, one by hand."""
    across, down = AXES[axes]
    for _, conv in list(convolutions(model)):
        if across and down:
            conv.padding_mode = "circular"
            continue
        height, width = conv.padding
        conv.padding = (0, width) if down else (height, 0)
        pad = (0, 0, height, height) if down else (width, width, 0, 0)
        conv.register_forward_pre_hook(lambda _, args, pad=pad: (F.pad(args[0], pad, mode="circular"), *args[1:]))


QUICK = [(0.0, "x"), (1.0, "x and y")]
SLOW = [(fraction, axes) for fraction in (1.0, 0.0) for axes in AXES if (fraction, axes) not in QUICK]


@pytest.mark.parametrize(
    ("fraction", "axes"), [*QUICK, *(pytest.param(*values, marks=pytest.mark.slow) for values in SLOW)]
)
def test_a_model_and_its_vae_are_those_with_circular_padding(fraction, axes, checkpoint):
    paths = checkpoint("sd15_unet", mult=(1,)), checkpoint("sd_vae")
    classic, vae = comfy.sd.load_diffusion_model(paths[0]), comfyui_vae(paths[1])
    ours = load_diffusion_model(paths[0], policy=budget(classic, fraction))
    our_vae = load_vae(paths[1], budget(vae.patcher, fraction))
    latent = sampling.latent(4, 64, 64)
    plain, plain_picture = run(classic), sampling.vae_decode(vae, latent)
    tiling, tiling_vae = SpillwaySeamlessTiling.execute(axes=axes, model=ours, vae=our_vae).args
    for _ in range(2):
        got, picture = run(tiling), sampling.vae_decode(tiling_vae, latent)
        assert_same(run(ours), plain)
        assert_same(sampling.vae_decode(our_vae, latent), plain_picture)
        for module in (*ours.model.modules(), *our_vae.first_stage_model.modules()):
            assert METHOD not in vars(module)
    for module in (classic.model, vae.first_stage_model):
        made_circular(module, axes)
    mm.unload_all_models()
    assert_same(got, run(classic))
    assert_same(picture, sampling.vae_decode(vae, latent))
    assert not torch.equal(got, plain) and not torch.equal(picture, plain_picture)


def test_the_edges_of_a_picture_meet(checkpoint):
    """A latent that is rolled gives a picture that is rolled, as there is no edge any more."""
    vae = load_vae(checkpoint("sd_vae"))
    _, tiling = SpillwaySeamlessTiling.execute(axes="x", vae=vae).args
    latent = sampling.latent(4, 64, 64)
    picture, rolled = (sampling.vae_decode(tiling, one) for one in (latent, latent.roll(3, -1)))
    off = 1e-3 if vae.vae_dtype is torch.float32 else 3e-2
    assert torch.allclose(picture.roll(24, 2), rolled, atol=off)
    assert not torch.allclose(sampling.vae_decode(vae, latent).roll(24, 2), rolled, atol=off)


def test_it_stays_on_clones_and_copies_hold_no_weight(checkpoint):
    model = load_diffusion_model(checkpoint("sd15_unet", mult=(1,)))
    tiling, none = SpillwaySeamlessTiling.execute(axes="y", model=model).args
    assert none is None
    wanted = run(tiling)
    assert_same(run(tiling.clone()), wanted)
    patch = next(iter(tiling.object_patches.values()))
    assert not any(torch.is_tensor(value) for value in vars(copy.deepcopy(patch)).values())


def test_models_that_cannot_tile_are_refused(checkpoint, flux):
    with pytest.raises(ValueError, match="has no convolution that pads a picture"):
        SpillwaySeamlessTiling.execute(axes="x", model=load_diffusion_model(flux))
    with pytest.raises(ValueError, match="this MODEL is not managed by Spillway"):
        SpillwaySeamlessTiling.execute(axes="x", model=comfy.sd.load_diffusion_model(flux))
    with pytest.raises(ValueError, match="connect 'model' or 'vae'"):
        SpillwaySeamlessTiling.execute(axes="x")
