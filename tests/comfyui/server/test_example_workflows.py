"""Example workflows run as they are, on a real server with narrow files of the names that they ask for."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

from kit.comfyui.example_workflows import lay_out, prompt_of
from kit.comfyui.running_server import Server

PICTURES = {
    "flux_style_reference": {(1024, 1024)},
    "sd15_seamless_controlnet": {(512, 512), (1024, 1024)},  # the narrow upscale model doubles
}
TEXTS = {
    "scan_models": ("controlnet/control_v11p_sd15_canny_fp16.safetensors", "flux1-dev.safetensors"),
    "convert_pickle": ("v1-5-pruned-emaonly.safetensors", "tensors"),
    "audio_encoder": ("encoded_audio",),
}
SAVED = {"merge_blocks": 3}
SLOW = {"flux_style_reference", "sd15_seamless_controlnet"}  # 20 steps and a whole VAE: minutes
ALL = [*PICTURES, *TEXTS, *SAVED]


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    base = tmp_path_factory.mktemp("examples")
    lay_out(base, ALL, checkpoint)
    with Server(base) as running:
        yield running


def kept(server, name, history):
    """Copy the pictures to where SPILLWAY_SHOTS says, for somebody to look at."""
    folder = os.environ.get("SPILLWAY_SHOTS")
    for output in history["outputs"].values():
        for place, image in enumerate(output.get("images", []) if folder else []):
            Path(folder).mkdir(parents=True, exist_ok=True)
            source = server.base / "output" / image["subfolder"] / image["filename"]
            shutil.copy(source, Path(folder) / f"{name}-{place}-{image['filename']}")


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in ALL])
def test_a_workflow_runs_as_it_is(name, server):
    history = server.run(prompt_of(name, server), 900)
    kept(server, name, history)
    assert history["status"]["status_str"] == "success", server.said()
    pictures = list(server.pictures_of(history).values())
    assert {picture.shape[:2] for picture in pictures} == PICTURES.get(name, set())
    for picture in pictures:
        assert picture.std() > 5, "no picture of one colour"
        assert (np.abs(np.diff(picture.astype(int), axis=0)) > 0).mean() > 0.1
    told = "\n".join(text for output in history["outputs"].values() for text in output.get("text", []))
    assert all(words in told for words in TEXTS.get(name, ())), told
    if name in SAVED:
        files = sorted((server.base / "output" / "diffusion_models").glob("Spillway*.safetensors"))
        assert len(files) == SAVED[name]
        for file in files:
            with safetensors.safe_open(file, "pt") as opened:
                assert len(list(opened.keys())) > 50
