"""Neither the disk tier nor a shared store serves what was made from what has changed: files, embeddings, source."""

import importlib.util
import os
import time
import types

import folder_paths
import nodes
import pytest
import torch
from comfy_execution.graph_utils import GraphBuilder

from kit.changes import CHANGES, in_place, same_size_and_time
from kit.comfyui.executor import Executor
from spillway.cache import content as content_module
from spillway.cache.comfyui import stamps as comfy_stamps
from spillway.cache.comfyui import tiers
from spillway.ops.files import coming_file
from spillway.ops.files.coming_file import ComingFile

pytestmark = pytest.mark.usefixtures("known_nodes", "installed", "tier")
RAN = []


def node_class(name, make, output=False):
    class Node:
        RETURN_TYPES = ("IMAGE",)
        FUNCTION = "run"
        OUTPUT_NODE = output

        @classmethod
        def INPUT_TYPES(cls):
            return {"optional": {key: ("*", {}) for key in ("a", "value")}}

        def run(self, **inputs):
            RAN.append(name)
            return make(**inputs)

    return Node


def content(name):
    """What lies under a name in any of the folders of these tests, as a tensor."""
    for folder in FOLDERS:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            path = os.path.join(path, "weights.bin")
        if os.path.isfile(path):
            with open(path, "rb") as file:
                return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)
    return torch.zeros(1)


def expand(value, **_):
    """Into a node whose file is no input of the node that it came from."""
    graph = GraphBuilder()
    return {"result": (graph.node("File", value="hidden.bin").out(0),), "expand": graph.finalize()}


FOLDERS = []
NODES = {
    "File": node_class("File", lambda value, **_: (content(value),)),
    "Text": node_class("Text", lambda value, **_: ("embedding:" + value,)),
    "Encode": node_class("Encode", lambda a=None, value="", **_: (content("foo.pt"),)),
    "Expand": node_class("Expand", expand),
    "Image": node_class("Image", lambda a, value=0, **_: (a * 2,)),
    "Show": node_class("Show", lambda **_: {"ui": {"text": ["shown"]}, "result": (None,)}, output=True),
}


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path, known_nodes):
    for name, kind in NODES.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    FOLDERS[:] = [str(tmp_path / name) for name in ("loras", "embeddings", "embeddings/sub", "input", "diffusers")]
    for folder in FOLDERS:
        os.makedirs(folder, exist_ok=True)
    for kind in ("loras", "embeddings", "diffusers"):
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "base_path", str(tmp_path))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(comfy_stamps, "STARTED", time.time_ns())  # this file may have been written just now
    return tmp_path


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(first, seed=1):
    return {"first": first, "image": node("Image", a=["first", 0], value=seed), "show": node("Show", a=["image", 0])}


def run(executor, prompt):
    RAN.clear()
    executor.run(prompt, "show")
    return list(RAN)


# What names a file, and where that lies.
NAMED = {
    "a LoRA": (node("File", value="x.bin"), "loras/x.bin"),
    "a LoRA in a folder": (node("File", value="sub/x.bin"), "loras/sub/x.bin"),
    "an image": (node("File", value="x.png"), "input/x.png"),
    "an image with its folder": (node("File", value="x.png [input]"), "input/x.png"),
    "no suffix": (node("File", value="x"), "loras/x"),
    "a model's folder": (node("File", value="model"), "diffusers/model/weights.bin"),
    "in a list": (node("File", value={"__value__": ["x.bin"]}), "loras/x.bin"),
    "an embedding": (node("Encode", value="a cat, embedding:foo"), "embeddings/foo.pt"),
    "with its suffix": (node("Encode", value="embedding:foo.pt in a hat"), "embeddings/foo.pt"),
    "weighted": (node("Encode", value="a ((embedding:foo:1.2)), cat"), "embeddings/foo.pt"),
    "followed by a comma": (node("Encode", value="embedding:foo, a cat"), "embeddings/foo.pt"),
    "in a folder below": (node("Encode", value="embedding:foo"), "embeddings/sub/foo.pt"),
    "a LoRA in a text": (node("File", value="a cat <lora:x.bin:0.8>, <other>"), "loras/x.bin"),
    "a LoRA in a text, in a folder below": (node("File", value="<lora:foo:1:0.5>"), "loras/sub/foo.safetensors"),
    "a wildcard in a text": (node("Text", value="a __colours/warm__ cat"), "wildcards/colours/warm.txt"),
    "any wildcard": (node("Text", value="a\ncat in __*__"), "models/wildcards/cats.yaml"),
    "on another line": (node("Encode", value="a cat\nembedding:foo\n" + "x " * 2000), "embeddings/foo.pt"),
}
WHEN = ["before it is evicted", "while it is down"]


@pytest.fixture
def named(places, request):
    first, path = NAMED[request.param]
    if isinstance(first["inputs"]["value"], dict):  # as ComfyUI unwraps it
        first = node("File", a=None, value="x.bin")
    path = places / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"first")
    return graph(first), path


@pytest.mark.parametrize("named", NAMED, indirect=True)
def test_what_has_not_changed_is_found(named, evict):
    prompt, _ = named
    first = Executor()
    assert len(run(first, prompt)) == 3
    evict(first)
    assert run(first, prompt) == run(Executor(), prompt) == ["Show"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("named", NAMED, indirect=True)
def test_what_has_changed_is_made_again(named, change, when, evict):
    prompt, path = named
    first = Executor()
    run(first, prompt)
    if when == WHEN[0]:
        change(path)
    evict(first)
    if when == WHEN[1]:
        change(path)
    later = Executor()
    assert len(run(later, prompt)) == 3
    evict(later)
    assert run(Executor(), prompt) == ["Show"], "what was made of the new one takes its place"


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("named", ["a LoRA", "an embedding", "a model's folder"], indirect=True)
def test_a_system_whose_times_say_nothing(named, when, monkeypatch, evict):
    """Windows' and network drives': size, number and times of another file may be the same."""
    prompt, path = named

    class Blind:
        """The module os, for which all files of a size are alike."""

        def __getattr__(self, name):
            return getattr(os, name)

        def stat(self, path):
            state = os.stat(path)
            times = dict.fromkeys(("st_mtime", "st_ctime", "st_mtime_ns", "st_ctime_ns", "st_ino"), 0)
            return types.SimpleNamespace(st_mode=state.st_mode, st_size=state.st_size, **times)

    monkeypatch.setattr(content_module, "STATES_TELL", False)
    monkeypatch.setattr(comfy_stamps, "os", Blind())
    first = Executor()
    run(first, prompt)
    if when == WHEN[0]:
        same_size_and_time(path)
    evict(first)
    if when == WHEN[1]:
        same_size_and_time(path)
    assert len(run(Executor(), prompt)) == 3


def test_names_of_pipes_and_devices_are_no_files_to_read(places, evict):
    """Else the prompt would wait for ever."""
    if hasattr(os, "mkfifo"):
        os.mkfifo(places / "loras" / "pipe.bin")
    executor = Executor()
    for name in ("pipe.bin", "/dev/zero", "/dev/stdin"):
        assert len(run(executor, graph(node("Text", value=name)))) == 3
    evict(executor)


@pytest.mark.parametrize("named", ["an embedding", "a LoRA"], indirect=True)
def test_what_was_not_there_and_now_is(named, evict):
    prompt, path = named
    path.unlink()
    first = Executor()
    run(first, prompt)
    evict(first)
    path.write_bytes(b"now it is")
    assert len(run(Executor(), prompt)) == 3


@pytest.mark.parametrize("put_together", [False, True])
def test_what_lies_at_an_address_may_be_another_thing_each_time(places, put_together, evict, monkeypatch):
    """But for Spillway's own nodes: what they bring lies here under a name, and stays what it is."""
    monkeypatch.setitem(NODES, "Ours", node_class("Ours", lambda **_: (torch.ones(1),)))
    monkeypatch.setattr(NODES["Ours"], "__module__", "spillway.nodes.one")
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Ours", NODES["Ours"])
    address = "https://example.org/a picture".replace(" ", "_")
    prompt = graph(node("File", value=address))
    if put_together:
        monkeypatch.setattr(NODES["Text"], "run", lambda self, value, **_: (RAN.append("Text"), (value + "_2",))[1])
        prompt = graph(node("Encode", a=["text", 0])) | {"text": node("Text", value="https://example.org/a")}
    first = Executor()
    whole = len(run(first, prompt))
    evict(first)
    assert len(run(Executor(), prompt)) == whole
    ours, first = graph(node("Ours", value=address)), Executor()
    run(first, ours)
    evict(first)
    assert run(Executor(), ours) == ["Show"]


def test_a_comparison_finds_nothing_that_was_made_before(places, evict):
    (places / "loras" / "x.bin").write_bytes(b"first")
    prompt, first = graph(node("File", value="x.bin")), Executor()
    run(first, prompt)
    evict(first)
    with tiers.left_out():
        assert len(run(Executor(), prompt)) == 3
    assert run(Executor(), prompt) == ["Show"]


def test_what_was_made_of_a_file_while_it_came_is_not_kept(places, monkeypatch, evict):
    """Nothing says yet which file it is, and an address may lead to another one in the next run."""
    path = places / "loras" / "x.bin"
    coming = ComingFile(path, path.with_name("x.bin.spillway-coming"), 5)
    monkeypatch.setattr(coming_file, "_coming", {path: coming})
    prompt, first = graph(node("File", value="x.bin")), Executor()
    run(first, prompt)
    coming_file.forget(coming)
    evict(first)
    assert len(run(Executor(), prompt)) == 3


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_output_made_later_of_one_made_before(places, change, evict):
    """The loader's output is still there as it was; the image is the old file's, whatever lies there now."""
    path = places / "loras" / "x.bin"
    path.write_bytes(b"first")
    first = Executor()
    run(first, graph(node("File", value="x.bin"), seed=1))
    change(path)
    assert run(first, graph(node("File", value="x.bin"), seed=2)) == ["Image", "Show"]
    evict(first)
    assert len(run(Executor(), graph(node("File", value="x.bin"), seed=2))) == 3


def test_an_output_of_both_the_old_and_the_new(places, evict, monkeypatch):
    """Two nodes read one file, and it changed in between: what is made of both is of neither."""
    monkeypatch.setattr(NODES["File"], "RELATIVE_PYTHON_MODULE", "comfy_extras.one", raising=False)
    monkeypatch.setattr(NODES["File"], "IS_CHANGED", classmethod(lambda cls, **_: ""), raising=False)
    path = places / "loras" / "x.bin"
    path.write_bytes(b"first")
    one = graph(node("File", value="x.bin"))
    first = Executor()
    run(first, one)
    in_place(path)
    both = one | {"second": node("File", value="x.bin", a="again"), "image": node("Image", a=["first", 0])}
    both["image"]["inputs"]["value"] = ["second", 0]
    assert run(first, both) == ["File", "Image", "Show"]
    evict(first)
    assert run(Executor(), both) == ["File", "Image", "Show"], "the second is of the new file alone"


def test_a_file_that_changes_while_a_node_runs(places, monkeypatch, evict):
    path = places / "loras" / "x.bin"
    path.write_bytes(b"first")

    def run_and_change(self, value, **_):
        found = content(value)
        in_place(path)
        return (found,)

    with monkeypatch.context() as patch:
        patch.setattr(NODES["File"], "run", run_and_change)
        first = Executor()
        first.run(graph(node("File", value="x.bin")), "show")
        evict(first)
    assert len(run(Executor(), graph(node("File", value="x.bin")))) == 3


def test_a_text_that_is_put_together(places, evict):
    """ComfyUI tells the cache what nodes gave, and not what they were given."""
    path = places / "embeddings" / "foo.pt"
    path.write_bytes(b"first")
    prompt = graph(node("Encode", a=["text", 0])) | {"text": node("Text", value="foo")}
    first = Executor()
    assert len(run(first, prompt)) == 4
    evict(first)
    assert run(Executor(), prompt) == ["Show"]
    in_place(path)
    assert "Encode" in run(Executor(), prompt)


def test_a_file_of_a_node_that_a_node_became(places, evict):
    path = places / "loras" / "hidden.bin"
    path.write_bytes(b"first")
    prompt = graph(node("Expand", value="anything"))
    first = Executor()
    assert "File" in run(first, prompt)
    evict(first)
    assert run(Executor(), prompt) == ["Show"]
    in_place(path)
    assert "File" in run(Executor(), prompt)


def test_outputs_made_while_it_was_off_are_not_written(places, monkeypatch, caplog, evict):
    """Nobody looked at the files then."""
    (places / "loras" / "x.bin").write_bytes(b"first")
    settings = places / "default" / "comfy.settings.json"
    text = settings.read_text()
    settings.unlink()
    caplog.set_level("INFO")
    first = Executor()
    run(first, graph(node("File", value="x.bin")))
    settings.write_text(text)
    assert run(first, graph(node("File", value="x.bin"), seed=2)) == ["Image", "Show"]
    evict(first)
    assert "not written: what it was made from was not watched" in caplog.text
    assert len(run(Executor(), graph(node("File", value="x.bin"), seed=2))) == 3


# --- source -----------------------------------------------------------------------------------------------------------

SOURCE = """
from helper import number
class Made:
    RETURN_TYPES, FUNCTION = ("IMAGE",), "run"
    @classmethod
    def INPUT_TYPES(cls):
        return {"optional": {"value": ("*", {})}}
    def run(self, **inputs):
        import torch
        return (torch.full((4,), float(number)),)
"""


@pytest.fixture
def pack(places, monkeypatch):
    """A pack of custom nodes, and a function that stands for the start of a process that loads it."""
    folder = places / "custom_nodes" / "pack"
    folder.mkdir(parents=True)
    (folder / "nodes.py").write_text(SOURCE)
    (folder / "helper.py").write_text("number = 1")
    (folder / "styles.json").write_text("{}")
    (folder / "run.log").write_text("started")
    extensions = folder_paths.folder_names_and_paths["custom_nodes"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(folder.parent)], extensions))

    def start():
        monkeypatch.syspath_prepend(str(folder))
        for name in ("helper", "made_nodes"):
            monkeypatch.delitem(importlib.sys.modules, name, raising=False)
        time.sleep(0.02)  # a file system's clock is coarse
        monkeypatch.setattr(comfy_stamps, "STARTED", time.time_ns())
        monkeypatch.setattr(comfy_stamps, "_sources", {})
        spec = importlib.util.spec_from_file_location("made_nodes", folder / "nodes.py")
        module = importlib.sys.modules["made_nodes"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Made", module.Made)
        return Executor()

    start.folder = folder
    return start


MADE = graph(node("Made", value="a"))


def test_the_same_source_is_found(pack, evict):
    first = pack()
    run(first, MADE)
    evict(first)
    assert run(pack(), MADE) == ["Show"]


@pytest.mark.parametrize("file", ["nodes.py", "helper.py", "styles.json", "wildcards/new.txt"])
@pytest.mark.parametrize("when", ["before it is first used", "while it is up", *WHEN])
def test_a_source_that_has_changed(pack, when, file, evict):
    """Changed while a process is up, it is not what that process runs."""

    def change():
        time.sleep(0.02)
        path = pack.folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_text((path.read_text() if path.exists() else "") + "\n# other\n")

    first = pack()
    if when == "before it is first used":
        change()
    run(first, MADE)
    if when == "while it is up":
        change()
        run(first, graph(node("Made", value="a"), seed=2))
    if when == WHEN[0]:
        change()
    evict(first)
    if when == WHEN[1]:
        change()
    later = pack()
    assert run(later, MADE) == ["Image", "Show"]
    assert later.cache.engine.entries and len(run(later, graph(node("Made", value="b")))) == 2


def test_what_a_pack_says_of_its_doings_is_none_of_its_data(pack, evict):
    first = pack()
    (pack.folder / "run.log").write_text("running")
    run(first, MADE)
    evict(first)
    (pack.folder / "run.log").write_text("ended")
    assert run(pack(), MADE) == ["Show"]


def test_data_that_was_another_one_for_a_while(pack, evict):
    """It is what it was when the process began, and what was made meanwhile is not of it."""
    first, styles = pack(), pack.folder / "styles.json"
    run(first, MADE)
    before = styles.read_text()
    time.sleep(0.02)
    styles.write_text("other")
    run(first, graph(node("Made", value="b")))
    styles.write_text(before)
    evict(first)
    assert run(pack(), graph(node("Made", value="b"))) == ["Image", "Show"]
