"""Subgraph blueprints: their border fits what is in them, and ComfyUI lists them."""

import asyncio
import itertools

import folder_paths
import pytest
from app.subgraph_manager import SubgraphManager

from kit.comfyui.blueprints import BLUEPRINTS, INPUTS, OUTPUTS, parts, read
from kit.pack import ROOT

each = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def test_there_is_one_for_each_common_set_up():
    assert {path.stem for path in BLUEPRINTS} == {
        "Any model within a limit (Spillway)",
        "Checkpoint with tiled VAE (Spillway)",
        "Flux on 8 GB (Spillway)",
        "Text encoder, free after use (Spillway)",
        "Wan 14B with a LoRA (Spillway)",
    }
    ids = [parts(path)[1]["id"] for path in BLUEPRINTS]
    assert len(set(ids)) == len(ids)


def test_comfyui_lists_them_and_hands_them_out(tmp_path, monkeypatch):
    """By the folder that they lie in, whatever the pack's folder is called."""
    (tmp_path / "ComfyUI-Spillway").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    manager = SubgraphManager()
    found = asyncio.run(manager.get_custom_node_subgraphs({}))
    assert {one["name"] for one in found.values()} == {path.stem for path in BLUEPRINTS}
    for number, one in found.items():
        assert one["info"] == {"node_pack": "custom_nodes.ComfyUI-Spillway"}
        (path,) = [path for path in BLUEPRINTS if path.stem == one["name"]]
        assert asyncio.run(manager.get_subgraph(number, {}))["data"] == path.read_text(encoding="utf-8")


@each
def test_the_border_fits_what_is_inside(path):
    """Every slot of the border leads somewhere, by links of its type, and the node outside has the same slots."""
    host, subgraph = parts(path)
    by_id = {node["id"]: node for node in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    assert host["type"] == subgraph["id"] and host["title"] == subgraph["name"] == path.stem
    assert subgraph["description"].endswith(".") and subgraph["category"] == "Spillway"
    slots = lambda entries: [(entry["name"], entry["type"]) for entry in entries]  # noqa: E731
    assert slots(host["inputs"]) == slots(subgraph["inputs"]) and slots(host["outputs"]) == slots(subgraph["outputs"])
    promoted = []
    for place, entry in enumerate(subgraph["inputs"]):
        for link in (links[number] for number in entry["linkIds"]):
            assert (link["origin_id"], link["origin_slot"], link["type"]) == (INPUTS, place, entry["type"])
            inner = by_id[link["target_id"]]["inputs"][link["target_slot"]]
            assert inner["link"] == link["id"] and inner["type"] == entry["type"]
            assert ("widget" in inner) == ("widget" in host["inputs"][place])
            promoted += [[str(link["target_id"]), inner["name"]]] if "widget" in inner else []
        assert entry["linkIds"], entry["name"]
    assert host["properties"]["proxyWidgets"][: len(promoted)] == promoted
    for place, entry in enumerate(subgraph["outputs"]):
        (link,) = (links[number] for number in entry["linkIds"])
        assert (link["target_id"], link["target_slot"]) == (OUTPUTS, place)
        output = by_id[link["origin_id"]]["outputs"][link["origin_slot"]]
        assert link["id"] in output["links"] and output["type"] in (entry["type"], "*")
    assert {link["origin_id"] for link in links.values()} <= {INPUTS, *by_id}
    ids = [one["id"] for entries in (subgraph["inputs"], subgraph["outputs"]) for one in entries]
    assert len(set(ids)) == len(ids) and subgraph["state"]["lastLinkId"] >= max(links)


@each
def test_a_text_encoder_that_is_freed_is_not_asked_again(path):
    """What frees it waits for the last prompt, and the sampler waits for that."""
    _, subgraph = parts(path)
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    frees = [one["id"] for one in nodes.values() if one["widgets_values"][:1] == ["drop RAM and pins too"]]
    before = {number: set() for number in nodes}
    for _, link in itertools.product(nodes, subgraph["links"]):
        if link["target_id"] in nodes and link["origin_id"] in nodes:
            before[link["target_id"]] |= {link["origin_id"]} | before[link["origin_id"]]
    encodes = {number for number, one in nodes.items() if one["type"] == "CLIPTextEncode"}
    for number in frees:
        assert encodes <= before[number]
        assert all(number in before[other] for other, one in nodes.items() if one["type"] == "KSampler")
    assert frees or not any("free" in words.lower() for words in (path.stem, read(path)["nodes"][0]["title"]))
