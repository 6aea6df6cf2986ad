"""Nodes that list GGUF files, which ComfyUI's own lists leave out."""

from pathlib import Path

import comfy.utils
import folder_paths
import pytest

from kit.comfyui.pairs import SMALL, assert_same, run
from kit.gguf_files import quantised_copy, write_gguf
from spillway.nodes.load import SpillwayLoadCLIP, SpillwayLoadDiffusionModel
from spillway.nodes.probe import SpillwayProbeModel
from spillway.patcher.comfyui.loading import load as comfy_load


def options(node, name):
    return next(part for part in node.define_schema().inputs if part.id == name).options


@pytest.fixture
def gguf(checkpoint):
    """A small Flux in a folder below that of diffusion models; returns its name there."""
    written, _ = quantised_copy(comfy.utils.load_torch_file(checkpoint("flux", **SMALL)), "Q8_0")
    place = Path(folder_paths.get_folder_paths("diffusion_models")[0]) / "below"
    place.mkdir(parents=True, exist_ok=True)
    path = Path(write_gguf(place / "flux-q8.GGUF", written))
    yield "below/flux-q8.GGUF"
    path.unlink()


def test_a_gguf_file_is_listed_loaded_and_probed(gguf):
    assert gguf in options(SpillwayLoadDiffusionModel, "unet_name")
    assert gguf not in options(SpillwayLoadCLIP, "clip_name1")
    (model,) = SpillwayLoadDiffusionModel.execute(unet_name=gguf, weight_dtype="default").args
    path = folder_paths.get_full_path("diffusion_models", gguf)
    assert_same(run(model, steps=1), run(comfy_load.load_diffusion_model(path), steps=1))
    assert f"diffusion_models/{gguf}" in options(SpillwayProbeModel, "file")
    (words,) = SpillwayProbeModel.execute(file=f"diffusion_models/{gguf}").args
    assert "diffusion model, Flux" in words and "quantised: Q8_0" in words and "ComfyUI loads it as: Flux" in words
    assert len(SpillwayLoadDiffusionModel.fingerprint_inputs(unet_name=gguf)[0].split()) > 2
