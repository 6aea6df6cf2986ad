"""Sliders for blocks give ComfyUI's merges, and curves those of their formulas."""

import math

import comfy.sd
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_extras import nodes_model_merging_model_specific as comfyui

from kit.comfyui.pairs import SMALL, assert_same, run
from spillway.nodes.merge import SpillwayMergeModels
from spillway.nodes.merge_blocks import SpillwayMergeBlocksFlux, SpillwayMergeBlocksSD15, SpillwayMergeBlocksSDXL
from spillway.nodes.save import SpillwaySaveDiffusionModel
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.merge import CURVES, block_of_keys

NODES = {
    "sd15": (SpillwayMergeBlocksSD15, comfyui.ModelMergeSD1, ("sd15_unet", {"mult": (1,)})),
    "sdxl": (SpillwayMergeBlocksSDXL, comfyui.ModelMergeSDXL, ("sd15_unet", {"mult": (1,)})),
    "flux": (SpillwayMergeBlocksFlux, comfyui.ModelMergeFlux1, ("flux", {**SMALL, "depth": 2})),
}


@pytest.mark.parametrize("name", NODES)
def test_sliders_give_comfyuis_merge(name, checkpoint):
    """SDXL's names are those of SD 1.5, of which this file has the first blocks."""
    node, comfyuis, (kind, options) = NODES[name]
    paths = [checkpoint(kind, **options, dtype=torch.float32, seed=seed) for seed in (0, 1)]
    theirs = [slot for slot in comfyuis.INPUT_TYPES()["required"] if not slot.startswith("model")]
    # ComfyUI gives some names without the dot at their end.
    assert [slot.rstrip(".") for slot in theirs] == list(node.blocks)
    shares = {slot: (index % 5) / 4 for index, slot in enumerate(node.blocks)}
    classic, ours = ([load(path) for path in paths] for load in (comfy.sd.load_diffusion_model, load_diffusion_model))
    ratios = {slot: 1.0 - shares[slot.rstrip(".")] for slot in theirs}
    (wanted,) = comfyuis().merge(*classic, **ratios)
    pair = {"model1": ours[0], "model2": ours[1]}
    (got,) = node.execute(**pair, curve="linear", **shares, other=1.0 - next(iter(ratios.values()))).args
    result = run(wanted)
    assert not torch.equal(result, run(classic[0]))
    assert_same(run(got), result)


def test_a_block_is_the_longest_name_that_a_key_begins_with():
    block = block_of_keys(["a.1", "a.11", "a", "b"])
    assert [block(key) for key in ("a.1.x", "a.11.x", "a.2.x", "b.x", "bc.x", "a.1")] == [
        "a.1",
        "a.11",
        "a",
        "b",
        "",
        "a",
    ]


def test_curves_are_flat_or_steep_at_their_ends():
    for curve in CURVES.values():
        assert [round(curve(share), 12) for share in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    assert CURVES["sigmoid"](0.25) == 0.15625 and math.isclose(CURVES["inverse sigmoid"](0.15625), 0.25)
    assert CURVES["linear"](0.3) == 0.3


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("mode", ["sigmoid", "inverse sigmoid"])
def test_a_merge_along_a_curve_is_its_formula(mode, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    paths = [checkpoint("flux", **SMALL, dtype=torch.float32, seed=seed) for seed in range(3)]
    models = [load_diffusion_model(path) for path in paths]
    named = dict(zip(("model1", "model2", "model3"), models, strict=True))
    groups = {"early": 0.25, "middle": -1.0, "late": -1.0, "other": -1.0}
    (merged,) = SpillwayMergeModels.execute(**named, mode=mode, ratio=0.4, ratio3=0.25, **groups).args
    path = SpillwaySaveDiffusionModel.execute(model=merged, filename_prefix="x", dtype="fp32").args[0]
    got, files = safetensors.torch.load_file(path), [safetensors.torch.load_file(one) for one in paths]
    for key, ratio in (("double_blocks.0.img_attn.qkv.weight", 0.25), ("img_in.weight", 0.4)):
        share, third = CURVES[mode](ratio), CURVES[mode](0.25)
        one, two, three = (file[key].double() for file in files)
        wanted = one + share * (two - one) + third * (three - one)
        assert torch.allclose(got[f"model.diffusion_model.{key}"].double(), wanted, rtol=1e-5, atol=1e-6)
