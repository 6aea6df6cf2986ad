"""The forecast of a graph: what is found on the way to a loader, what could be set, and that no weight is read."""

import json

import folder_paths
import pytest
import torch

from kit.comfyui.checkpoints.diffusion_models import flux_entries
from kit.comfyui.forecast_graphs import graph, node, pages_in_ram, put_files, write_hole
from kit.comfyui.on_device import weights_at_once
from spillway.nodes.forecast import SpillwayMemoryForecast
from spillway.nodes.forecast_report import forecast
from spillway.nodes.forecast_words import in_lines
from spillway.nodes.routes import MAX_PROMPT_BYTES, BadRequest, parse_prompt, read_object
from spillway.patcher.dynamic_model import models

MIB, GIB = 1 << 20, 1 << 30
FLUX = "forecast-flux.safetensors"
LARGE = {"hidden": 3072, "depth": 19, "depth_single": 38, "context": 4096, "pooled": 768}


@pytest.fixture(scope="module", autouse=True)
def files(models_dir, checkpoint):
    put_files(models_dir, checkpoint)


def only(prompt):
    (told,) = forecast(prompt)["samplers"]
    return told


def codes(told):
    return [note["code"] for note in told["notes"]]


def test_no_weight_of_a_file_larger_than_the_ram_is_read(models_dir, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # the tests' own, and slow
    path = models_dir / "diffusion_models" / "forecast-large.safetensors"
    with weights_at_once():
        end = write_hole(path, flux_entries(torch.bfloat16, **LARGE))
    before = set(models)
    told = only(graph(path.name, gigabytes=8.0))
    read = pages_in_ram(path)
    path.unlink()
    assert end > 20 * GIB and told["forecast"]["total"] >= end * 0.99
    assert told["forecast"]["resident"] <= 8 * GIB < told["forecast"]["streamed"]
    assert read < 4 * MIB and set(models) <= before
    ways = {way["code"]: way["forecast"] for way in told["ways"]}
    # Modulations, 6.6 of 23.8 GB in 16 bit, keep their dtype.
    assert ways["int8"]["total"] < 0.65 * told["forecast"]["total"]


def test_what_could_be_set_comes_with_what_would_then_be():
    told = only(graph(FLUX, gigabytes=0.01, batch=3))
    ways = {way["code"]: way for way in told["ways"]}
    assert {"int8", "gguf", "batch"} <= set(ways)
    assert (ways["int8"]["id"], ways["int8"]["widget"], ways["int8"]["value"]) == ("loader", "weight_dtype", "int8")
    assert (ways["gguf"]["widget"], ways["gguf"]["value"]) == ("unet_name", "forecast-flux-Q8_0.gguf")
    assert (ways["batch"]["id"], ways["batch"]["widget"], ways["batch"]["value"]) == ("latent1", "batch_size", 1)
    for way in ways.values():
        prompt = graph(FLUX, gigabytes=0.01, batch=3)
        prompt[way["id"]]["inputs"][way["widget"]] = way["value"]
        assert only(prompt)["forecast"] == way["forecast"], "what is set then gives what was said"
    assert only(graph(FLUX))["ways"] == []


def test_nodes_on_the_way_are_known_or_named():
    prompt = graph(FLUX, lora=True)
    plain = only(prompt)
    assert plain["notes"] == [] and plain["loader"] == {"id": "loader", "kind": "SpillwayLoadDiffusionModel"}
    prompt["strange"] = node("FromAnotherPack", model=["lora", 0])
    prompt["sampler1"]["inputs"]["model"] = ["strange", 0]
    told = only(prompt)
    assert told["notes"] == [{"code": "passed", "node": "strange", "kind": "FromAnotherPack"}]
    assert told["forecast"] == plain["forecast"]
    prompt["loader"] = node("LoaderOfAnotherPack", unet_name=FLUX)
    assert codes(only(prompt)) == ["unknown"] and only(prompt)["forecast"] is None
    prompt["loader"] = node("UNETLoader", unet_name=FLUX, weight_dtype="default")
    assert codes(only(prompt)) == ["passed", "theirs"]
    prompt["lora"]["inputs"]["model"] = ["strange", 0]
    assert codes(only(prompt)) == ["circle"]


def test_the_nodes_of_guided_sampling_and_quantising_are_known():
    prompt = graph(FLUX, gigabytes=0.01)
    prompt["int8"] = node("SpillwayQuantiseModel", model=["policy", 0], weight_dtype="int8", leave_out="")
    prompt["guider"] = node("CFGGuider", model=["int8", 0], cfg=2.0)
    prompt["sampler1"] = node("SamplerCustomAdvanced", guider=["guider", 0], latent_image=["latent1", 0])
    told = only(prompt)
    loaded = graph(FLUX, gigabytes=0.01, dtype="int8")
    assert told["forecast"]["streamed"] == only(loaded)["forecast"]["streamed"] > 0
    assert {(way["id"], way["widget"]) for way in told["ways"] if way["code"] == "four_bits"} <= {
        ("int8", "weight_dtype")
    }


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda prompt: prompt["loader"]["inputs"].update(unet_name="no-such-file.safetensors"), "error"),
        (lambda prompt: prompt["loader"]["inputs"].update(unet_name=["somewhere", 0]), "wired"),
        (lambda prompt: prompt["loader"]["inputs"].update(weight_dtype="int3"), "error"),
        (lambda prompt: prompt["sampler1"]["inputs"].update(model=["gone", 0]), "missing"),
        (lambda prompt: prompt["latent1"]["inputs"].update(width=["somewhere", 0]), "size"),
        (lambda prompt: prompt["loader"]["inputs"].update(policy=["sampler1", 0]), "policy"),
    ],
)
def test_what_cannot_be_known_is_said(change, code):
    prompt = graph(FLUX)
    change(prompt)
    told = only(prompt)
    assert codes(told) == [code]
    assert (told["forecast"] is None) == (code not in ("size", "policy"))
    assert in_lines(forecast(prompt)).count("\n") == 1


def test_the_node_says_the_same_as_the_route(monkeypatch):
    prompt = graph(FLUX, gigabytes=0.01)
    monkeypatch.setattr(SpillwayMemoryForecast, "hidden", type("Hidden", (), {"prompt": prompt}), raising=False)
    value, text, data = SpillwayMemoryForecast.execute(value="latent").result
    assert value == "latent" and json.loads(data) == json.loads(json.dumps(forecast(parse_prompt({"prompt": prompt}))))
    assert "each step brings" in text and "weight_dtype of SpillwayLoadDiffusionModel (loader) to int8" in text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "no object"),
        ({"prompt": []}, "no object"),
        ({"prompt": {str(n): {} for n in range(5001)}}, "at most 5000 nodes"),
        ({"prompt": {"1": {"class_type": "KSampler"}}}, 'node "1" has no'),
        ({"prompt": {"1": {"class_type": 1, "inputs": {}}}}, 'node "1" has no'),
        ({"prompt": {}, "run": True}, "no run to give"),
    ],
)
def test_a_wrong_request_is_refused(asked, words):
    with pytest.raises(BadRequest, match=words):
        parse_prompt(asked)


def test_a_request_is_bounded():
    with pytest.raises(BadRequest, match="larger than"):
        read_object("application/json", b" " * (MAX_PROMPT_BYTES + 1), MAX_PROMPT_BYTES)
    assert forecast({}) == {"samplers": [], "uses": [], "left_out": 0}
    assert "no sampler" in in_lines(forecast({}))
    many = graph(FLUX)
    many |= {f"more{n}": many["sampler1"] for n in range(9)}
    told = forecast(many)
    assert len(told["samplers"]) == 8 and told["left_out"] == 2


def test_the_size_of_a_picture_is_in_its_header(tmp_path, monkeypatch):
    from PIL import Image

    Image.new("RGB", (320, 192)).save(tmp_path / "in.png")
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    prompt = graph(FLUX)
    prompt["image"] = node("LoadImage", image="in.png")
    prompt["encoded"] = node("VAEEncode", pixels=["image", 0])
    prompt["latent1"] = node("RepeatLatentBatch", samples=["encoded", 0], amount=2)
    assert only(prompt)["forecast"]["latent"] == [2, 16, 24, 40]
