"""Literals in the place of wires: every node says which input is wrong, what it expected and what to do."""

import asyncio
from types import SimpleNamespace

import pytest
import torch

from spillway.nodes.checked_node import KINDS, CheckedNode
from spillway.nodes.extension import SpillwayExtension
from spillway.nodes.load import SpillwayMakeDynamic
from spillway.nodes.vae import SpillwayVAEDecode
from spillway.patcher.policy import Policy

NODES = asyncio.run(SpillwayExtension().get_node_list())
BASIC = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "*"}
WIRES = [(node, entry) for node in NODES for entry in node.GET_SCHEMA().inputs if entry.io_type not in BASIC]
RIGHT = {
    "MODEL": SimpleNamespace(model=1, clone=1),
    "CLIP": SimpleNamespace(patcher=1, clone=1),
    "VAE": SimpleNamespace(decode=1, encode=1),
    "CLIP_VISION": SimpleNamespace(patcher=1, model=1),
    "LATENT": {"samples": torch.zeros(1)},
    "IMAGE": torch.zeros(1, 8, 8, 3),
    "SPILLWAY_POLICY": Policy(),
}
JUNK = ["x", "", 1, 0, 1.5, True, False, {}, {"samples": "x"}, [], [1, 2, 3], {"keep": "always"}, "x" * 100_000]


def ids(wire):
    return f"{wire[0].__name__}.{wire[1].id}"


def execute(node, **given):
    """With what every other input takes, as far as it is checked."""
    inputs = {entry.id: RIGHT.get(entry.io_type) for entry in node.GET_SCHEMA().inputs}
    return node.execute(**{**inputs, **given})


def test_all_nodes_are_checked():
    assert all(issubclass(node, CheckedNode) for node in NODES)
    assert {entry.io_type for _, entry in WIRES} == set(KINDS) == set(RIGHT)


@pytest.mark.parametrize("wire", WIRES, ids=ids)
def test_a_literal_is_refused_by_name(wire):
    node, entry = wire
    advice = "or leave it unconnected." if entry.optional else "Connect it to "
    for junk in JUNK:
        with pytest.raises(ValueError, match="; expected a wire of type ") as error:
            execute(node, **{entry.id: junk})
        words = str(error.value)
        assert words.startswith(f"{node.GET_SCHEMA().display_name}: the input '{entry.id}' is ")
        assert f"type {entry.io_type}. Connect it to a" in words and advice in words and len(words) < 400


@pytest.mark.parametrize("wire", [wire for wire in WIRES if not wire[1].optional], ids=ids)
def test_nothing_is_refused_where_something_is_needed(wire):
    node, entry = wire
    with pytest.raises(ValueError, match=rf"the input '{entry.id}' is empty; expected a wire of type {entry.io_type}"):
        execute(node, **{entry.id: None})


def test_copies_that_comfyui_makes_are_checked_too():
    for kind, name in ((SpillwayMakeDynamic, "policy"), (SpillwayVAEDecode, "samples")):
        with pytest.raises(ValueError, match=rf"the input '{name}' is 'x' \(str\)"):
            execute(kind.PREPARE_CLASS_CLONE(None), **{name: "x"})


def test_objects_whose_words_fail():
    class Mute:
        def __repr__(self):
            raise RuntimeError("no words")

    with pytest.raises(ValueError, match=r"the input 'policy' is <Mute instance at .*> .Mute."):
        execute(SpillwayMakeDynamic, policy=Mute())
