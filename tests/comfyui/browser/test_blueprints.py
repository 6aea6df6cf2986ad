"""Subgraph blueprints in a browser: found by their names, put into the graph, taken by the server, and one is run."""

import json
import os

import pytest

from kit.comfyui.blueprints import BLUEPRINTS, files_of, parts, read
from kit.comfyui.running_server import node

RUN = "Checkpoint with tiled VAE (Spillway)"
AT_ONCE = {"Flux on 8 GB (Spillway)"}  # the others with --slow alone
EMPTY = (2).to_bytes(8, "little") + b"{}"  # a safetensors file of nothing: its name is all that validation asks for
QUICK = {"width": 64, "height": 64, "steps": 1}


@pytest.fixture(scope="module")
def page(servers, visit, models, checkpoint):
    """A page whose server has a file for each name that a blueprint asks for. The one that is run has a model."""
    for path in BLUEPRINTS:
        for folder, name in files_of(path):
            file = models / folder / name
            file.parent.mkdir(exist_ok=True)
            if path.stem == RUN:
                os.symlink(checkpoint("sd15"), file)
            elif not file.exists():
                file.write_bytes(EMPTY)
    return visit(servers("device"))


def widgets(page):
    found = "Object.fromEntries(window.app.graph.nodes[0].widgets.map((one) => [one.name, one.value]))"
    return page.page.evaluate(found)


def with_ends(path, prompt):
    """A prompt with a loader where the blueprint wants a model, and with what shows each of its outputs."""
    _, subgraph = parts(path)
    (outer,) = {name.partition(":")[0] for name in prompt}
    if any(entry["type"] == "MODEL" for entry in subgraph["inputs"]):
        prompt["loader"] = node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
        links = (link for link in subgraph["links"] if link["type"] == "MODEL" and link["target_id"] > 0)
        for link in links:
            name = subgraph["nodes"][link["target_id"] - 1]["inputs"][link["target_slot"]]["name"]
            prompt[f"{outer}:{link['target_id']}"]["inputs"][name] = ["loader", 0]
    for place, entry in enumerate(subgraph["outputs"]):
        (link,) = (one for one in subgraph["links"] if one["id"] == entry["linkIds"][0])
        source = [f"{outer}:{link['origin_id']}", link["origin_slot"]]
        prompt[f"end {place}"] = node("PreviewAny", source=source)
    return prompt


def test_it_is_found_by_its_name_and_makes_a_picture(page):
    """As a user does it: search, put it into the graph, give it values, press Run."""
    (path,) = [one for one in BLUEPRINTS if one.stem == RUN]
    page.page.evaluate("window.app.graph.clear()")
    page.command("Workspace.SearchBox.Toggle")
    page.page.wait_for_selector("input:focus")
    page.page.keyboard.type(path.stem)
    page.page.get_by_role("dialog").get_by_text(path.stem).first.wait_for()
    page.page.wait_for_timeout(500)
    page.page.keyboard.press("Enter")
    page.page.wait_for_function("window.app.graph.nodes.length === 1")
    page.page.mouse.click(700, 200)  # where it is to lie
    page.page.evaluate(
        """(values) => {
          for (const widget of window.app.graph.nodes[0].widgets)
            if (widget.name in values) widget.value = values[widget.name];
          const end = window.LiteGraph.createNode("PreviewImage");
          window.app.graph.add(end);
          window.app.graph.nodes[0].connect(0, end, 0);
        }""",
        QUICK,
    )
    history = page.run()
    assert history["status"]["status_str"] == "success", history["status"]
    assert [len(output["images"]) for output in history["outputs"].values()] == [1]
    assert page.said == []


@pytest.mark.parametrize(
    "path",
    [pytest.param(one, marks=[] if one.stem in AT_ONCE else [pytest.mark.slow]) for one in BLUEPRINTS],
    ids=lambda path: path.stem,
)
def test_it_opens_with_its_values_and_makes_a_prompt_that_the_server_takes(page, path, shots):
    assert path.stem in {one["name"] for one in page.server.get("global_subgraphs").values()}
    page.page.evaluate("(blueprint) => window.app.loadGraphData(blueprint)", read(path))
    page.page.wait_for_function(f"window.app.graph.nodes[0]?.title === {json.dumps(path.stem)}")
    host, subgraph = parts(path)
    shown = widgets(page)
    assert set(shown) == {entry["name"] for entry in host["inputs"] if "widget" in entry}
    inner = {one["id"]: one["widgets_values"] for one in subgraph["nodes"]}
    for entry in subgraph["inputs"]:
        (link,) = (one for one in subgraph["links"] if one["id"] == entry["linkIds"][0])
        assert entry["name"] not in shown or shown[entry["name"]] in inner[link["target_id"]], entry["name"]
    prompt = page.page.evaluate("window.app.graphToPrompt().then(({ output }) => output)")
    assert {one["class_type"] for one in prompt.values()} == {one["type"] for one in subgraph["nodes"]}
    shots(page, f"blueprint-{path.stem}")
    # Refused with 400, were it not valid. What it makes of files of nothing concerns no page, and is not waited for.
    told = page.server.get("prompt", {"prompt": with_ends(path, prompt), "client_id": "nobody"})
    page.server.get("interrupt", {})
    page.server.get("queue", {"clear": True})
    assert told["node_errors"] == {} and page.said == []
