"""Merged models: ComfyUI's merges bit for bit, quantised models too, and no memory for a second model."""

import os

import comfy.model_management as mm
import comfy.sd
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract

from kit.comfyui.loras import forms, with_lora
from kit.comfyui.pairs import SMALL, assert_same, budget, run
from spillway.nodes.merge import DIFFERENCE, SUM, SpillwayMergeModels
from spillway.nodes.save import SpillwaySaveDiffusionModel
from spillway.ops.files import deferred
from spillway.ops.files.disk_map import open_maps
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.merge import group_of_keys

LIKE_RATIO = {"early": -1.0, "middle": -1.0, "late": -1.0, "other": -1.0}


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(deferred, "PART_BYTES", 1 << 15)  # several parts also for small models
    return tmp_path


def merged(*models, mode=SUM, ratio=0.5, **others):
    names = ("model1", "model2", "model3")
    given = dict(zip(names, models, strict=False))
    return SpillwayMergeModels.execute(**given, mode=mode, ratio=ratio, **{**LIKE_RATIO, **others}).args[0]


def comfyui_merged(node, *models, **options):
    return getattr(node(), node.FUNCTION)(*models, **options)[0]


def saved(model, dtype="fp32"):
    path = SpillwaySaveDiffusionModel.execute(model=model, filename_prefix="x", dtype=dtype).args[0]
    return safetensors.torch.load_file(path)


@pytest.fixture
def paths(checkpoint):
    return [checkpoint("flux", **SMALL, dtype=torch.float32, seed=seed) for seed in range(3)]


def assert_same_weights(got, wanted):
    got, wanted = saved(got), saved(wanted)
    assert set(got) == set(wanted)
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_a_weighted_sum_is_comfyuis_bit_for_bit(fraction, paths):
    """With LoRAs on both; run and saved."""
    classic = [comfy.sd.load_diffusion_model(path) for path in paths[:2]]
    ours = [load_diffusion_model(path, policy=budget(classic[0], fraction)) for path in paths[:2]]
    classic, ours = ([with_lora(one, forms("lora")), with_lora(other, forms("dora"))] for one, other in (classic, ours))
    # ComfyUI's ratio is the first model's share.
    wanted = comfyui_merged(ModelMergeSimple, *classic, ratio=0.7)
    got = merged(*ours, ratio=0.3)
    wanted_run = run(wanted)
    assert not torch.equal(wanted_run, run(classic[0]))
    near = 1e-4 if ours[0].model.get_dtype() is torch.float32 else 0.1  # 1 - 0.7 is not quite 0.3
    assert torch.allclose(run(got), wanted_run, rtol=near, atol=near)
    exact = comfyui_merged(ModelMergeSimple, *classic, ratio=0.75)
    assert_same(run(merged(*ours, ratio=0.25)), run(exact))
    assert_same_weights(merged(*ours, ratio=0.25), exact)
    assert_same_weights(merged(ours[0], classic[1], ratio=0.25), exact)
    assert_same_weights(merged(classic[0], ours[1], ratio=0.25), exact)
    assert_same(run(merged(*ours, ratio=0.0)), run(classic[0]))


def test_weights_of_another_model_are_merged_as_that_model_computes_with_them(paths, monkeypatch):
    """A device takes fp32 files in 16 bit: what is merged in is rounded before it is multiplied, as ComfyUI's is."""
    monkeypatch.setattr(mm, "unet_dtype", lambda *_, **__: torch.bfloat16)
    classic, ours = (
        [load(path) for path in paths[:2]] for load in (comfy.sd.load_diffusion_model, load_diffusion_model)
    )
    wanted = run(comfyui_merged(ModelMergeSimple, *classic, ratio=0.75))
    assert_same(run(merged(*ours, ratio=0.25)), wanted)


def test_the_groups_of_a_u_net_are_those_of_comfyuis_node(checkpoint):
    classic, ours = (
        [load(checkpoint("sd15_unet", mult=(1,), dtype=torch.float32, seed=seed)) for seed in (0, 1)]
        for load in (comfy.sd.load_diffusion_model, load_diffusion_model)
    )
    wanted = comfyui_merged(
        ModelMergeBlocks,
        *classic,
        **{"input": 0.75, "middle": 0.5, "out": 0.25, "time": 1.0, "label": 1.0, "out.": 1.0},
    )
    assert_same_weights(merged(*ours, early=0.25, middle=0.5, late=0.75, other=0.0), wanted)


def test_the_groups_of_other_models_are_thirds_of_their_blocks(checkpoint):
    model = load_diffusion_model(checkpoint("flux", **{**SMALL, "depth": 2, "depth_single": 4}))
    group = group_of_keys(model.model.diffusion_model)
    blocks = ["double_blocks.0.", "double_blocks.1.", *(f"single_blocks.{index}." for index in range(4))]
    assert [group(f"{block}x.weight") for block in blocks] == [g for g in ("early", "middle", "late") for _ in range(2)]
    assert group("img_in.weight") == group("final_layer.linear.weight") == "other"


@pytest.mark.usefixtures("in_fp32")
def test_three_models_are_summed_by_their_ratios(paths):
    ours = [load_diffusion_model(path) for path in paths]
    got = saved(merged(*ours, ratio=0.25, ratio3=0.5))
    one, two, three = (safetensors.torch.load_file(path) for path in paths)
    key = "double_blocks.0.img_attn.qkv.weight"
    wanted = one[key] * 0.25 + two[key] * 0.25 + three[key] * 0.5
    assert torch.allclose(got[f"model.diffusion_model.{key}"], wanted, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"model2 \(0.75\) and model3 \(0.5\) are together more than 1"):
        merged(*ours, ratio=0.75, ratio3=0.5)


@pytest.mark.usefixtures("in_fp32")
def test_an_added_difference_is_near_comfyuis(paths):
    classic, ours = ([load(path) for path in paths] for load in (comfy.sd.load_diffusion_model, load_diffusion_model))
    wanted = comfyui_merged(ModelAdd, classic[0], comfyui_merged(ModelSubtract, *classic[1:], multiplier=0.5))
    # ComfyUI multiplies what stands there too: (0.5 model2 - 0.5 model3) is added to model1.
    got = merged(*ours, mode=DIFFERENCE, ratio=0.5)
    assert torch.allclose(run(got), run(wanted), rtol=1e-3, atol=1e-4)
    assert_same(run(merged(ours[0], ours[1], ours[1], mode=DIFFERENCE, ratio=0.0)), run(ours[0]))
    with pytest.raises(ValueError, match="add difference needs three models"):
        merged(*ours[:2], mode=DIFFERENCE)


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize("both", [True, False])
def test_quantised_models(both, paths):
    """Merged as plain numbers; a quantised first model is quantised again, as with a LoRA."""
    quantised = []
    for path in paths[:2]:
        node = SpillwaySaveDiffusionModel.execute(
            model=load_diffusion_model(path), filename_prefix="q", dtype="fp8_e4m3fn scaled"
        )
        quantised.append(load_diffusion_model(node.args[0]))
    first = quantised[0] if both else load_diffusion_model(paths[0])
    model = merged(first, quantised[1], ratio=0.25)
    result = run(model)
    assert torch.isfinite(result).all() and not torch.equal(result, run(first))
    weights = [dict(one.model.named_parameters()) for one in (first, quantised[1])]
    got = saved(model)
    key = "double_blocks.0.img_attn.qkv.weight"
    one, two = (side[f"diffusion_model.{key}"] for side in weights)
    wanted = (one.dequantize() if both else one).float().cpu() * 0.75 + two.dequantize().float() * 0.25
    error = (got[f"model.diffusion_model.{key}"] - wanted).norm() / wanted.norm()
    exact = two.dequantize().dtype is torch.float32
    assert error < (0.05 if both else 1e-6 if exact else 1e-3)
    # What was saved is what ran.
    path = SpillwaySaveDiffusionModel.execute(model=model, filename_prefix="m", dtype="as loaded").args[0]
    assert_same(run(load_diffusion_model(path)), result)


def test_the_others_files_stay_as_long_as_the_merge(paths):
    """The second model's node may be gone from the cache when the merge is used."""
    first, second = (load_diffusion_model(path) for path in paths[:2])
    model = merged(first, second)
    wanted = run(model)
    del first, second
    again = model.clone()
    del model
    assert {os.path.basename(m.path) for m in open_maps()} >= {os.path.basename(path) for path in paths[:2]}
    assert_same(run(again), wanted)


def test_models_that_do_not_fit_are_refused_with_the_reason(checkpoint, paths):
    first = load_diffusion_model(paths[0])
    with pytest.raises(ValueError, match=r"is \(128, 64\) in one model and \(256, 64\) in the other"):
        merged(first, load_diffusion_model(checkpoint("flux", **{**SMALL, "hidden": 256})))
    with pytest.raises(ValueError, match=r"Flux and WAN21 share \d+ weights of \d+"):
        merged(first, load_diffusion_model(checkpoint("wan", layers=1)))


@pytest.mark.usefixtures("in_fp32")
def test_a_weight_that_only_one_model_has_is_kept(checkpoint, paths, caplog):
    """Flux dev and schnell: the guidance embedding is dev's alone."""
    dev, schnell = load_diffusion_model(paths[0]), load_diffusion_model(checkpoint("flux", **SMALL, guidance=False))
    caplog.set_level("INFO")
    got = saved(merged(dev, schnell, ratio=0.5))
    assert "4 weights that only the first model has" in caplog.text
    key = "guidance_in.in_layer.weight"
    assert torch.equal(got[f"model.diffusion_model.{key}"], safetensors.torch.load_file(paths[0])[key])
