"""Load a file twice, by ComfyUI with everything in memory and by the pack on a budget, and compare the outputs."""

import dataclasses
import inspect

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.dynamic_vram import in_pieces
from kit.device import is_real
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

# How much of a model's weights stays: all, some and nothing. A half is some too, so it runs with --slow.
FRACTIONS = (1.0, 0.25, 0.0)
EACH_FRACTION = [1.0, pytest.param(0.5, marks=pytest.mark.slow), 0.25, 0.0]
SMALL = {"hidden": 128, "depth": 1, "depth_single": 1}  # a Flux of 2 MB

# ComfyUI's dynamic patcher gives other latents than its classic one: with 4 bits, and with LoRAs on quantised weights.
KNOWN = inspect.signature(comfy.sd.load_diffusion_model).parameters
CLASSIC = {"disable_dynamic": True} if "disable_dynamic" in KNOWN else {}


def classic_model(path):
    """Load a diffusion model as ComfyUI does without dynamic VRAM."""
    return comfy.sd.load_diffusion_model(path, **CLASSIC)


def budget(reference, fraction):
    """Make a policy whose budget is a fraction of what ComfyUI's patcher `reference` takes, and room for all at 1.0."""
    nbytes = int(fraction * reference.model_size())
    return Policy(vram_bytes=nbytes if fraction < 1 else in_pieces(nbytes))


def pair(path, fraction=0.5, weight_dtype="default"):
    """Return ComfyUI's classic patcher, and the pack's with a budget of `fraction` of that."""
    classic = comfy.sd.load_diffusion_model(path, model_options=dict(comfy_load.WEIGHT_DTYPES[weight_dtype]))
    return classic, comfy_load.load_diffusion_model(path, weight_dtype, budget(classic, fraction))


def comfyui_vae(path):
    tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
    vae.throw_exception_if_invalid()
    return vae


def run(model, steps=2, **options):
    return sampling.sample(model, steps=steps, **{"width": 32, "height": 32, **options})


def assert_same(got, wanted):
    """Compare bit for bit: tensors, or sequences of tensors and None."""
    if torch.is_tensor(got):
        got, wanted = [got], [wanted]
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if one is None and other is None:
            continue
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(one, other), (
            f"output {index}: {int((one != other).sum())} of {one.numel()} numbers differ, by up to "
            f"{float((one - other).abs().max()):g}"
        )


def assert_alike(got, wanted, device):
    """Compare with what the device under test computed: bit for bit where `device` has its kernels, else near."""
    if not is_real() or torch.device(device).type == comfy.model_management.get_torch_device().type:
        assert_same(got, wanted)
        return
    got, wanted = ([one] if torch.is_tensor(one) else one for one in (got, wanted))
    for one, other in zip(got, wanted, strict=True):
        one, other = one.float(), other.float()
        assert (one - other).norm() < 0.02 * other.norm()


def brought(patcher, bundle):
    """Count the bytes that are brought of a bundle: a device gets the source and makes the final form of it there."""
    return bundle.nbytes if patcher.dynamic.backend.in_place else bundle.source_bytes


def counters(patcher):
    """Copy the counters of a patcher's engine."""

    return dataclasses.replace(patcher.dynamic.ledger.counters)
