"""VAEs from GGUF files beside ComfyUI's own, with the same weights."""

import math
from pathlib import Path

import comfy.utils
import folder_paths
import pytest
import torch

from kit.comfyui import checkpoints, sampling
from kit.comfyui.pairs import assert_same, budget, comfyui_vae
from kit.gguf_files import random_blocks, write_gguf
from spillway.nodes.load import SpillwayLoadVAE
from spillway.ops.files.safetensors_header import SourceError
from spillway.ops.gguf.dequantise import IN_TORCH
from spillway.ops.gguf.weight import GgufWeight
from spillway.patcher.comfyui.loading import load as comfy_load

MODELS = {"flux_vae": torch.rand(1, 16, 2, 2), "wan_vae": torch.rand(1, 16, 1, 2, 2)}


def written_as_rows(tensors):
    """Lay kernels out in rows, as a format with four dimensions needs. Every second one becomes blocks of Q8_0."""
    written, stands_for, shapes = {}, {}, {}
    for number, (name, tensor) in enumerate(tensors.items()):
        written[name], stands_for[name] = tensor, tensor
        rows = math.prod(tensor.shape) // 32
        if tensor.dim() < 4 or rows * 32 != tensor.numel():
            continue
        shapes[f"comfy.gguf.orig_shape.{name}"] = list(tensor.shape)
        if len(shapes) % 2:
            blocks = random_blocks("Q8_0", tensor.numel(), number, float(tensor.float().std()))
            written[name] = ("Q8_0", (rows, 32), blocks)
            stands_for[name] = IN_TORCH["Q8_0"](blocks, torch.float32).view(tensor.shape).to(torch.bfloat16)
        else:
            written[name] = tensor.view(rows, 32)
    return written, stands_for, shapes


@pytest.mark.parametrize("model", MODELS)
def test_pictures_are_those_of_the_dequantised_weights(model, checkpoint, tmp_path):
    written, stands_for, shapes = written_as_rows(comfy.utils.load_torch_file(checkpoint(model)))
    gguf = write_gguf(tmp_path / "vae.gguf", written, {"general.architecture": "pig", **shapes})
    classic = comfyui_vae(checkpoints.write(tmp_path / "vae.safetensors", stands_for))
    ours = comfy_load.load_vae(gguf, budget(classic.patcher, 0.25))
    params = [param for bundle in ours.patcher.dynamic.bundles for param in bundle.params]
    assert any(isinstance(param.source, GgufWeight) for param in params)
    assert_same(sampling.vae_decode(ours, MODELS[model]), sampling.vae_decode(classic, MODELS[model]))


def test_the_node_lists_and_loads_it(checkpoint):
    place = Path(folder_paths.get_folder_paths("vae")[0])
    place.mkdir(parents=True, exist_ok=True)
    tensors = comfy.utils.load_torch_file(checkpoint("flux_vae"))
    path = Path(write_gguf(place / "ae.gguf", tensors, {"general.architecture": "pig"}))
    wrong = Path(write_gguf(place / "other.gguf", {"a.weight": torch.ones(4, 4)}))
    options = next(part for part in SpillwayLoadVAE.define_schema().inputs if part.id == "vae_name").options
    assert "ae.gguf" in options
    (vae,) = SpillwayLoadVAE.execute(vae_name="ae.gguf").args
    classic = comfyui_vae(checkpoint("flux_vae"))
    latent = MODELS["flux_vae"]
    assert_same(sampling.vae_decode(vae, latent), sampling.vae_decode(classic, latent))
    with pytest.raises(SourceError, match=r"other\.gguf: no VAE that ComfyUI knows"):
        SpillwayLoadVAE.execute(vae_name="other.gguf")
    path.unlink()
    wrong.unlink()
