"""Example workflows run as they are, on a real server with narrow files of the names that they ask for."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors

from kit.comfyui.example_workflows import lay_out, prompt_of
from kit.comfyui.running_server import Server, node

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
    # The attention that ComfyUI takes on a CPU by itself takes minutes for pictures of this size.
    with Server(base, ["--use-pytorch-cross-attention"]) as running:
        yield running


def kept(server, name, history):
    """Copy the pictures to where SPILLWAY_SHOTS says, for somebody to look at."""
    folder = os.environ.get("SPILLWAY_SHOTS")
    for output in history["outputs"].values():
        for place, image in enumerate(output.get("images", []) if folder else []):
            Path(folder).mkdir(parents=True, exist_ok=True)
            source = server.base / "output" / image["subfolder"] / image["filename"]
            shutil.copy(source, Path(folder) / f"{name}-{place}-{image['filename']}")


def seams(picture):
    """How far its opposite edges are apart, beside rows or columns that are neighbours: 1 where there is no seam."""
    numbers = picture.astype(float)
    apart = [np.abs(numbers.take(0, axis) - numbers.take(-1, axis)).mean() for axis in (0, 1)]
    near = [np.abs(np.diff(numbers, axis=axis)).mean() for axis in (0, 1)]
    return max(one / other for one, other in zip(apart, near, strict=True))


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in ALL])
def test_a_workflow_runs_as_it_is(name, server):
    history = server.run(prompt_of(name, server), 2400)
    kept(server, name, history)
    assert history["status"]["status_str"] == "success", server.said()
    pictures = list(server.pictures_of(history).values())
    assert {picture.shape[:2] for picture in pictures} == PICTURES.get(name, set())
    for picture in pictures:
        assert picture.std() > 5, "no picture of one colour"
        assert (np.abs(np.diff(picture.astype(int), axis=0)) > 0).mean() > 0.1
    if name == "sd15_seamless_controlnet":
        (tile,) = (picture for picture in pictures if picture.shape[0] == 512)
        assert seams(tile) < 1.5 < seams(tile[:-7, :-7]), "its edges are neighbours, and others of it are not"
    told = "\n".join(text for output in history["outputs"].values() for text in output.get("text", []))
    assert all(words in told for words in TEXTS.get(name, ())), told
    if name in SAVED:
        files = sorted((server.base / "output" / "diffusion_models").glob("Spillway*.safetensors"))
        assert len(files) == SAVED[name]
        for file in files:
            with safetensors.safe_open(file, "pt") as opened:
                assert len(list(opened.keys())) > 50


def stacked(names, server):
    """The history of a picture with LoRAs at inputs of these names, of which the first has all of the strength."""
    prompt = prompt_of("sd15_seamless_controlnet", server)
    by_type = {one["class_type"]: (number, one["inputs"]) for number, one in prompt.items()}
    checkpoint, chosen = by_type["SpillwayLoadCheckpoint"][0], by_type["SpillwayLora"][1]
    stack, inputs = by_type["SpillwayGrowingLoraStack"]
    sampler = by_type["KSampler"][1]
    for name in [name for name in inputs if name.startswith("loras.")]:
        inputs.pop(name)
    for place, name in enumerate(names):
        strengths = {"strength_model": float(place == 0), "strength_clip": 0.0}
        prompt[f"lora {name}"] = node("SpillwayLora", **{**chosen, **strengths})
        inputs[name] = [f"lora {name}", 0]
    ends = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    sampler |= {"model": [stack, 0], "steps": 1, **ends}
    kept = {number: prompt[number] for number in (checkpoint, stack, *(f"lora {name}" for name in names))}
    kept[checkpoint]["inputs"].pop("policy", None)
    kept |= {
        "text": node("CLIPTextEncode", clip=[stack, 1], text="leaves"),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node("KSampler", **sampler),
        "picture": node("VAEDecode", samples=["sampler", 0], vae=[checkpoint, 2]),
        "end": node("SaveImage", images=["picture", 0], filename_prefix="stack"),
    }
    return kept


def test_a_stack_of_no_loras_of_many_and_of_some_with_gaps(server):
    """Through the server's own check of prompts, which knows inputs that grow by their names."""
    first = ["loras.lora0"]
    many = [f"loras.lora{place}" for place in range(50)]
    pictures = {}
    for label, names in {"none": [], "one": first, "gap": ["loras.lora7"], "many": many}.items():
        ((_, pictures[label]),) = server.pictures(stacked(names, server)).items()
    assert (pictures["one"] == pictures["many"]).all() and (pictures["one"] == pictures["gap"]).all()
    assert (pictures["one"] != pictures["none"]).any()
    # One more than there can be: left out or refused, and the server goes on.
    code, _ = server.ask("prompt", json.dumps({"prompt": stacked([*first, "loras.lora50"], server)}).encode())
    assert code in (200, 400)
    server.wait(lambda: not server.get("queue")["queue_running"] and not server.get("queue")["queue_pending"], 120)
    ((_, again),) = server.pictures(stacked(["loras.lora0"], server)).items()
    assert (again == pictures["one"]).all()
