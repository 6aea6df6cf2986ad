"""Subgraph blueprints: what is in one, as a workflow whose links are lists, and as a prompt in API format."""

import json

from kit.pack import ROOT

BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
INPUTS, OUTPUTS = -10, -20  # the ids of a subgraph's border in its links


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def parts(path):
    """(node that stands for the subgraph, the subgraph) of a blueprint's file."""
    workflow = read(path)
    (host,), (subgraph,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    return host, subgraph


def inside(path):
    """The nodes of a blueprint and the links between them, as in a workflow's file.

    A widget at the border has its own value, until somebody gives it another, and so no link.
    """
    _, subgraph = parts(path)
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [[link[key] for key in keys] for link in subgraph["links"]]
    at_border = {number for number, origin, _, target, *_ in links if origin == INPUTS or target == OUTPUTS}
    for one in subgraph["nodes"]:
        for entry in one["inputs"]:
            if "widget" in entry and entry["link"] in at_border:
                entry["link"] = None
    return {"nodes": subgraph["nodes"], "links": [link for link in links if link[0] not in at_border]}


def files_of(path):
    """(folder of models, name) of each file that a blueprint asks for."""
    return [
        (model["directory"], model["name"])
        for one in inside(path)["nodes"]
        for model in one["properties"].get("models", [])
    ]
