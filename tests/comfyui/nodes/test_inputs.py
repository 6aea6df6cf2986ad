"""Wrong values for wires, numbers, texts and choices: every node says which input is wrong and what it expected."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from comfy_api.latest import io

from spillway.nodes.checked_node import KINDS, CheckedNode
from spillway.nodes.extension import SpillwayExtension
from spillway.nodes.inputs import OpenChoice
from spillway.nodes.load import SpillwayLoadCLIP, SpillwayMakeDynamic
from spillway.nodes.old_ids import INT8LazyTorchCompile
from spillway.nodes.vae import SpillwayVAEDecode
from spillway.patcher.policy import Policy

NODES = asyncio.run(SpillwayExtension().get_node_list())
BASIC = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "*"}
# The old node takes the values of another pack's too.
VALUES = [
    (node, entry)
    for node in NODES
    for entry in node.GET_SCHEMA().inputs
    if entry.io_type in BASIC - {"*"} and node is not INT8LazyTorchCompile
]
WIRES = [(node, entry) for node in NODES for entry in node.GET_SCHEMA().inputs if entry.io_type not in BASIC]
RIGHT = {
    "COMFY_AUTOGROW_V3": {},
    "MODEL": SimpleNamespace(model=1, clone=1),
    "CLIP": SimpleNamespace(patcher=1, clone=1),
    "VAE": SimpleNamespace(decode=1, encode=1, first_stage_model=1),
    "CLIP_VISION": SimpleNamespace(patcher=1, model=1),
    "LATENT": {"samples": torch.zeros(1)},
    "IMAGE": torch.zeros(1, 8, 8, 3),
    "SPILLWAY_POLICY": Policy(),
}
JUNK = ["x", "", 1, 0, 1.5, True, False, {}, {"samples": "x"}, [], [1, 2, 3], {"keep": "always"}, "x" * 100_000]


def ids(wire):
    return f"{wire[0].__name__}.{wire[1].id}"


def right(entry):
    default = getattr(entry, "default", None)
    return next(iter(getattr(entry, "options", None) or ["a"])) if default is None else default


def execute(node, **given):
    """With what every other input takes, as far as it is checked."""
    inputs = {
        entry.id: RIGHT[entry.io_type] if entry.io_type in RIGHT else right(entry) for entry in node.GET_SCHEMA().inputs
    }
    return node.execute(**{**inputs, **given})


def test_all_nodes_are_checked():
    assert all(issubclass(node, CheckedNode) for node in NODES)
    assert {entry.io_type for _, entry in WIRES} == set(KINDS) == set(RIGHT)


@pytest.mark.parametrize("wire", WIRES, ids=ids)
def test_a_literal_is_refused_by_name(wire):
    node, entry = wire
    advice = "or leave it unconnected." if entry.optional else "Connect it to "
    for junk in JUNK:
        if junk == {} and entry.io_type == "COMFY_AUTOGROW_V3":
            continue  # nothing is connected to an input that grows
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


NAN, INF = float("nan"), float("inf")
WRONG_VALUES = {
    "INT": ["x", None, 1.5, NAN, {}, 10**400, -(10**400)],
    "FLOAT": ["x", None, {}, NAN, INF, -INF, 10**400, torch.zeros(2)],
    "STRING": [None, 1, {}, ["x"], "\ud800"],
    "BOOLEAN": [None, "x", 2, NAN, {}],
    "COMBO": [None, 1, {}, ["x"], "\ud800"],
}


@pytest.mark.parametrize("value", VALUES, ids=ids)
def test_a_wrong_value_is_refused_by_name(value):
    """As it comes by a wire of any type. What goes into the message can be written to any log."""
    node, entry = value
    wrong = WRONG_VALUES[entry.io_type] + ["nonsense"] * (
        entry.io_type == "COMBO" and not isinstance(entry, OpenChoice)
    )
    for one in wrong:
        if one is None and entry.optional:
            continue
        with pytest.raises(ValueError, match="; expected ") as error:
            execute(node, **{entry.id: one})
        words = str(error.value)
        assert words.startswith(f"{node.GET_SCHEMA().display_name}: the input '{entry.id}' is ")
        assert len(words.encode()) < 600


def test_nothing_for_an_optional_value_is_its_default():
    class Node(CheckedNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Optional", inputs=[io.Int.Input("number", min=0, max=9, optional=True)])

        @classmethod
        def execute(cls, number=5):
            return number

    assert Node.execute(number=None) == Node.execute() == 5 and Node.execute(number=3) == 3


def test_the_first_text_encoder_cannot_be_left_out():
    with pytest.raises(FileNotFoundError, match="There is no file 'none'"):
        SpillwayLoadCLIP.execute(clip_name1="none", type="stable_diffusion")
