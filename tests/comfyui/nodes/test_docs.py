"""What a user reads: help pages, texts, tooltips and example workflows say what the nodes really have."""

import asyncio
import itertools
import json

import comfy_extras.nodes_audio
import comfy_extras.nodes_audio_encoder
import comfy_extras.nodes_flux
import comfy_extras.nodes_hunyuan
import comfy_extras.nodes_model_advanced
import comfy_extras.nodes_model_patch
import comfy_extras.nodes_preview_any
import comfy_extras.nodes_sd3
import comfy_extras.nodes_upscale_model
import nodes as comfyui_nodes
import pytest

from kit.comfyui.blueprints import BLUEPRINTS, inside
from kit.pack import ROOT
from spillway.nodes.extension import SpillwayExtension

PAGES = ROOT / "web" / "docs"
LOCALE = ROOT / "locales" / "en"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
RUN_BY_COMFY_TEST = sorted((ROOT / "workflows" / "tests").glob("*.json"))
RUNNABLE = [*WORKFLOWS, *RUN_BY_COMFY_TEST]
GRAPHS = [*RUNNABLE, *BLUEPRINTS]

NODES = {node.define_schema().node_id: node for node in asyncio.run(SpillwayExtension().get_node_list())}
# A node under an older id is the same node, and nobody is to choose it.
OURS = {name: node for name, node in NODES.items() if not node.define_schema().is_deprecated}
# ComfyUI's nodes that the workflows use, and those that only the frontend knows.
COMFYUI = {
    **comfyui_nodes.NODE_CLASS_MAPPINGS,
    **comfy_extras.nodes_model_advanced.NODE_CLASS_MAPPINGS,
    **comfy_extras.nodes_preview_any.NODE_CLASS_MAPPINGS,
    **comfy_extras.nodes_model_patch.NODE_CLASS_MAPPINGS,
    "AudioEncoderEncode": comfy_extras.nodes_audio_encoder.AudioEncoderEncode,
    "EmptyAudio": comfy_extras.nodes_audio.EmptyAudio,
    "ImageUpscaleWithModel": comfy_extras.nodes_upscale_model.ImageUpscaleWithModel,
    "FluxGuidance": comfy_extras.nodes_flux.FluxGuidance,
    "EmptyHunyuanLatentVideo": comfy_extras.nodes_hunyuan.EmptyHunyuanLatentVideo,
    "EmptySD3LatentImage": comfy_extras.nodes_sd3.EmptySD3LatentImage,
}
NOTES = {"Note", "MarkdownNote"}
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize")
MAX_PREVIEW_BYTES = 200_000


def read(path):
    """A file's JSON; of a blueprint what is in its subgraph."""
    if path in BLUEPRINTS:
        return inside(path)
    return json.loads(path.read_text(encoding="utf-8"))


def types_and_options(inputs):
    """(name, type, options of a choice, extra) of every input in the order of the node's slots and widgets."""
    for part in ("required", "optional"):
        for name, spec in inputs.get(part, {}).items():
            kind, extra = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(kind, (list, tuple)):
                yield name, "COMBO", kind, extra
            else:
                yield name, kind, extra.get("options"), extra


def socket_types(node):
    """The type of every socket by its name in a workflow. Those of an input that grows are named after both."""
    found = {}
    for name, kind, _, extra in types_and_options(node.INPUT_TYPES()):
        found[name] = kind
        if kind == "COMFY_AUTOGROW_V3":
            template = extra["template"]
            one = next(iter(template["input"]["required"].values()))[0]
            found |= {f"{name}.{template['prefix']}{place}": one for place in range(template["max"])}
    return found


def names_in(node):
    return [name for name, *_ in types_and_options(node.INPUT_TYPES())]


# --- the nodes themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_every_part_of_a_node_is_explained(name):
    schema = OURS[name].define_schema()
    assert "Spillway" in schema.display_name and schema.category and schema.description.endswith(".")
    assert schema.search_aliases
    silent = [part.id or part.get_io_type() for part in (*schema.inputs, *schema.outputs) if not part.tooltip]
    assert not silent, f"no tooltip: {', '.join(silent)}"
    assert all(part.tooltip.endswith(".") for part in (*schema.inputs, *schema.outputs))


# --- help pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_help_page_names_every_input_and_output(name):
    node, text = OURS[name], (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {node.define_schema().display_name}\n")
    sections = text.split("\n## ")
    assert [section.splitlines()[0].rstrip("s") for section in sections[1:]] == [
        "Input",
        "Output",
        "Example",
        "When it fail",
    ]
    for section, wanted in ((sections[1], names_in(node)), (sections[2], list(node.RETURN_NAMES))):
        found = [line.split("**")[1] for line in section.splitlines() if line.startswith("- **")]
        assert sorted(found) == sorted(wanted)


def test_there_is_no_page_without_a_node():
    assert {page.stem for page in PAGES.glob("*.md")} == set(OURS)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_the_english_texts_are_those_of_the_schemas():
    wanted = {}
    for name, node in OURS.items():
        schema = node.define_schema()
        wanted[name] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {part.id: {"name": part.id, "tooltip": part.tooltip} for part in schema.inputs},
            "outputs": {
                str(place): {"name": label, "tooltip": part.tooltip}
                for place, (label, part) in enumerate(zip(node.RETURN_NAMES, schema.outputs, strict=True))
            },
        }
    assert read(LOCALE / "nodeDefs.json") == wanted


def test_category_and_data_type_have_a_name():
    texts = read(LOCALE / "main.json")
    assert set(texts["nodeCategories"]) == {node.define_schema().category for node in OURS.values()}
    assert set(texts["dataTypes"]) == {"SPILLWAY_LORA", "SPILLWAY_POLICY"}


# --- example workflows ------------------------------------------------------------------------------------------------


def test_every_node_is_in_a_workflow():
    used = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    assert used >= set(OURS)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_a_small_preview(path):
    picture = path.with_suffix(".jpg").read_bytes()
    assert picture.startswith(b"\xff\xd8\xff") and len(picture) < MAX_PREVIEW_BYTES


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_workflow_has_an_output_so_that_it_can_be_run(path):
    """ComfyUI refuses a prompt without one."""
    known = {**OURS, **COMFYUI}
    assert any(getattr(known.get(node["type"]), "OUTPUT_NODE", False) for node in read(path)["nodes"])


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_workflow_has_known_nodes_with_values_that_they_take(path):
    for node in read(path)["nodes"]:
        if node["type"] in NOTES:
            continue
        assert node["type"] in {**OURS, **COMFYUI}, f"{node['type']} is no node of ComfyUI or of this pack"
        values = list(node.get("widgets_values", []))
        files = [model["name"] for model in node["properties"].get("models", [])]
        wired = {entry["name"] for entry in node["inputs"] if "widget" in entry and entry["link"] is not None}
        for name, kind, options, extra in types_and_options({**OURS, **COMFYUI}[node["type"]].INPUT_TYPES()):
            if kind not in WIDGETS or extra.get("forceInput"):
                continue
            assert values, f"{node['type']}: no value for {name}"
            value, where = values.pop(0), f"{node['type']}.{name}"
            assert isinstance(value, WIDGETS[kind]), f"{where} is {value!r}, not of {kind}"
            if kind in ("INT", "FLOAT"):
                assert extra.get("min", value) <= value <= extra.get("max", value), f"{where}: {value} is out of range"
            if name in wired:
                continue  # the value is of no effect
            if kind == "COMBO" and str(value).endswith((".safetensors", ".gguf", ".ckpt")):
                file = value.rpartition("/")[2]  # some choices name the folder too
                assert file in files, f"{where}: nothing says where {value} comes from"
                files.remove(file)
            elif kind == "COMBO":
                assert value in options, f"{where}: {value!r} is not one of its choices"
            if extra.get("control_after_generate"):
                assert values.pop(0) in AFTER_GENERATE
        assert not values, f"{node['type']}: values too many: {values}"
        assert not files, f"{node['type']}: {files} are named and not used"


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_workflows_links_fit_their_slots(path):
    workflow = read(path)
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for link, from_id, from_slot, to_id, to_slot, kind in workflow["links"]:
        source, target = by_id[from_id], by_id[to_id]
        output, entry = source["outputs"][from_slot], target["inputs"][to_slot]
        assert link in output["links"] and link == entry["link"]
        wanted = socket_types({**OURS, **COMFYUI}[target["type"]])[entry["name"]]
        given = {**OURS, **COMFYUI}[source["type"]].RETURN_TYPES[from_slot]
        assert output["type"] == given and entry["type"] == wanted
        assert len({given, wanted, kind} - {"*"}) <= 1, f"{given} goes into {wanted}"
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        linked = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        required = {**OURS, **COMFYUI}[node["type"]].INPUT_TYPES()["required"]
        sockets = {name for name, kind, *_ in types_and_options({"required": required}) if kind not in WIDGETS}
        assert sockets <= linked, f"{node['type']}: {', '.join(sockets - linked)} is not connected"


def test_comfy_test_has_a_workflow_that_it_can_run():
    """It refuses notes, and needs every widget's value at its place. Each runs without a model file."""
    assert RUN_BY_COMFY_TEST
    named = (ROOT / "comfy-test.toml").read_text(encoding="utf-8")
    for path in RUN_BY_COMFY_TEST:
        assert f'"{path.name}"' in named
        types = {node["type"] for node in read(path)["nodes"]}
        assert not types & NOTES and types & set(OURS)
        assert not any(node["properties"].get("models") for node in read(path)["nodes"])


def box(node):
    """(left, top, right, bottom) of a node as the frontend draws it: high enough for its slots and widgets."""
    sockets = [entry for entry in node.get("inputs", []) if "widget" not in entry]
    widgets = 0 if node["type"] in NOTES else len(node.get("widgets_values") or [])
    rows = 20 * max(len(sockets), len(node.get("outputs", [])))
    height = max(node["size"][1], 6 + rows + (24 * widgets + 8 if widgets else 0))
    (left, top), width = node["pos"], node["size"][0]
    return left, top - 30, left + width, top + height  # the title is above


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_node_of_a_workflow_lies_on_another(path):
    """A node that has got an input since is drawn larger than it was."""
    boxes = [(f"{node['type']} {node['id']}", box(node)) for node in read(path)["nodes"]]
    for (one, (left, top, right, bottom)), (other, (a, b, c, d)) in itertools.combinations(boxes, 2):
        assert min(right, c) <= max(left, a) or min(bottom, d) <= max(top, b), f"{one} lies on {other}"
