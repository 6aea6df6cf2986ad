"""A node that keeps a file by its path makes outputs of the old one after it was replaced: nobody finds those."""

import os
import types

import comfy.model_patcher
import comfy.samplers
import folder_paths
import nodes
import pytest
import safetensors.torch
import torch
from PIL import Image

from kit.changes import CHANGES, another_link, by_rename, gone, same_by_rename
from kit.comfyui.executor import Executor, node_class
from spillway.cache.comfyui import stamps as comfy_stamps
from spillway.cache.comfyui import tiers
from spillway.cache.comfyui.first_seen import FirstSeen, first_seen, reads_anew

pytestmark = pytest.mark.usefixtures("known_nodes", "installed", "tier")
BY_ANOTHER = [by_rename, same_by_rename, another_link]
REPLACED = [change for change in CHANGES if change is not gone]


def write_lora(path, number):
    """A LoRA that adds this number to a weight. All have one size."""
    up, down = torch.full((4, 1), float(number)), torch.ones(1, 4)
    names = "diffusion_model.layer.lora_up.weight", "diffusion_model.layer.lora_down.weight"
    safetensors.torch.save_file(dict(zip(names, (up, down), strict=True)), path)


def model(**_):
    inner = torch.nn.Module()
    inner.diffusion_model = torch.nn.Module()
    inner.diffusion_model.layer = torch.nn.Linear(4, 4, bias=False)
    inner.diffusion_model.layer.weight.data.zero_()
    inner.model_config = types.SimpleNamespace(unet_config={})
    return comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu")), None


def weight(a, **_):
    return a.patch_weight_to_device("diffusion_model.layer.weight", return_weight=True).clone(), None


FOLDER, FILES = [""], {}


def kept(value, b, **_):
    """As packs do that remember for the whole process what they have read."""
    path = os.path.join(FOLDER[0], value)
    if path not in FILES:
        FILES[path] = safetensors.torch.load_file(path)["diffusion_model.layer.lora_up.weight"].clone()
    return FILES[path] * b, None


NODES = {
    "Model": node_class("Model", model),
    "Weight": node_class("Weight", weight),
    "Kept": node_class("Kept", kept),
    "Name": node_class("Name", lambda value, **_: (value, None)),
    "Image": node_class("Image", lambda a, **_: (a * 2, None)),
    "Show": node_class("Show", lambda **_: {"ui": {"text": ["x"]}, "result": (None,)}, output=True),
}


@pytest.fixture(autouse=True)
def lora(monkeypatch, tmp_path, known_nodes):
    for name, kind in NODES.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    (tmp_path / "loras").mkdir()
    extensions = folder_paths.folder_names_and_paths["loras"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], extensions))
    FOLDER[0] = str(tmp_path / "loras")
    path = tmp_path / "loras" / "style.safetensors"
    write_lora(path, 1)
    return path


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def with_lora(strength, name="style.safetensors"):
    """ComfyUI's Load LoRA, and the weight that comes of it."""
    return {
        "model": node("Model"),
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=strength),
        "image": node("Weight", a=["lora", 0]),
        "show": node("Show", a=["image", 0]),
    }


def with_pack(number):
    return {
        "lora": node("Kept", value="style.safetensors", b=number),
        "image": node("Image", a=["lora", 0]),
        "show": node("Show", a=["image", 0]),
    }


def with_text(number):
    """The name comes over a wire."""
    return with_pack(number) | {
        "name": node("Name", value="style.safetensors"),
        "lora": node("Kept", value=["name", 0], b=number),
    }


GRAPHS = {"Load LoRA": with_lora, "a pack's node": with_pack, "a name over a wire": with_text}


def made(executor, graph):
    """The first number of the image that a graph gives."""
    executor.run(graph, "show")
    engine, key = executor.cache.engine, executor.cache._key("image")
    return float(engine.values[key].outputs[0][0].flatten()[0])


def replace(path, change):
    """Have another LoRA there, in that way."""
    change(path)
    state, link = os.stat(path), os.path.realpath(path)
    write_lora(link, 3)
    os.utime(link, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", REPLACED, ids=lambda change: change.__name__)
@pytest.mark.parametrize("how", GRAPHS)
def test_what_a_node_made_of_a_file_that_it_had_kept_is_found_by_nobody(how, change, lora, evict, caplog):
    graph = GRAPHS[how]
    FILES.clear()
    here = Executor()
    caplog.set_level("INFO")
    first = made(here, graph(1.0))
    evict(here)
    replace(lora, change)
    stale = made(here, graph(0.5))
    if change in BY_ANOTHER:  # else what ComfyUI has kept is a map of the file, which was written into
        assert stale == first / 2, "the node has kept the old one"
    evict(here)
    FILES.clear()
    there = Executor()
    assert made(there, graph(0.5)) == 1.5 * first
    assert "style.safetensors may have been replaced since it was first used" in caplog.text
    evict(there)
    later = Executor()
    made(later, graph(0.5))
    assert later.cache.engine.run.found, "what another process made of the new one is found"


@pytest.mark.parametrize("when", ["off", "a comparison", "other settings"])
def test_a_file_that_was_given_to_a_node_while_nobody_looked(when, lora, user, evict, monkeypatch):
    """The node may have kept what lay there then."""
    monkeypatch.setattr(comfy_stamps, "STARTED", min(lora.stat().st_mtime_ns, lora.stat().st_ctime_ns))
    settings = user / "default" / "comfy.settings.json"
    told = settings.read_text()
    here = Executor()
    if when == "a comparison":
        with tiers.left_out():
            made(here, with_lora(1.0))
    else:
        settings.write_text("{}")
        made(here, with_lora(1.0))
        settings.write_text(told)
    replace(lora, CHANGES[0])
    made(here, with_lora(0.5))
    evict(here)
    assert made(Executor(), with_lora(0.5)) == 1.5


def test_a_file_that_comes_while_comfyui_runs_is_shared(lora, evict):
    """It was never given to a node as another one."""
    here = Executor()
    made(here, with_lora(1.0))
    write_lora(lora.with_name("new.safetensors"), 5)
    made(here, with_lora(1.0, "new.safetensors"))
    evict(here)
    later = Executor()
    assert made(later, with_lora(1.0, "new.safetensors")) == 5 and later.cache.engine.run.found


def test_nodes_that_say_when_their_file_is_another_one_are_trusted_where_they_are_known():
    for name in ("LoadImage", "LoadImageMask", "LoadLatent"):
        assert reads_anew(name), name
    for name in ("LoraLoader", "CheckpointLoaderSimple", "KSampler", "no such node"):
        assert not reads_anew(name), name


def test_an_image_that_is_replaced_is_shared_as_before(lora, evict, monkeypatch):
    """ComfyUI's Load Image reads it each time, and says when it is another one."""
    monkeypatch.setattr(folder_paths, "input_directory", str(lora.parent))
    graph = {"load": node("LoadImage", image="x.png"), "image": node("Image", a=["load", 0])}
    graph["show"] = node("Show", a=["image", 0])
    path = lora.with_name("x.png")
    here = Executor()
    for grey in (255, 51):
        Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)
        assert made(here, graph) == pytest.approx(2 * grey / 255)
        evict(here)
    later = Executor()
    assert made(later, graph) == pytest.approx(0.4) and later.cache.engine.run.found


def test_what_is_remembered_is_bounded(monkeypatch):
    seen = FirstSeen()
    monkeypatch.setattr("spillway.cache.comfyui.first_seen.MAX_NAMES", 10)
    old, new = [[[1, 5, 0, 5, "a", "x"]]], [[[1, 15, 0, 15, "b", "x"]]]
    for number in range(25):
        seen.look({("file", str(number)): old}, 10)
    assert len(seen._first) <= 10 and seen.replaced({("file", "24"): new}) == "24"
    seen.look({("file", "0"): new}, 10)
    assert seen.replaced({("file", "0"): new}) == "0", "it was forgotten what it was, and it changed since the start"
    assert first_seen is not seen


def test_a_new_file_in_a_folder_of_some_words_name_replaces_nothing():
    """'flux' is a choice of CLIPLoader, and may be a folder of LoRAs too."""
    seen, name = FirstSeen(), ("file", "flux")
    old, new = [9, 1, 2, 1, "content", "flux/a.safetensors"], [9, 5, 3, 5, "other", "flux/b.safetensors"]
    seen.look({name: [[old]]}, started=4)
    assert seen.replaced({name: [[old, new]]}) is None
    assert seen.replaced({name: [[[*old[:4], "another", old[5]], new]]}) == "flux"
    assert seen.replaced({name: [[new]]}) == "flux" and seen.replaced({name: None}) == "flux"


def test_a_run_that_leaves_the_tiers_out_is_looked_at_too():
    """Else a file whose first use is a comparison with ComfyUI would be unknown until a restart."""
    executor = Executor()
    with tiers.left_out():
        assert executor.cache._watches
