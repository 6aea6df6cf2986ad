"""Every form of weight patch that ComfyUI knows, in every dtype of weights, against ComfyUI's classic patcher."""

import logging

import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import torch
from comfy_extras import nodes_model_merging as merging
from comfy_extras import nodes_model_merging_model_specific as specific

from kit.comfyui import checkpoints, sampling
from kit.comfyui.loras import SHAPES, numbers, with_lora
from kit.comfyui.pairs import SMALL, assert_same, budget, pair, run
from spillway.patcher.comfyui.loading import load as comfy_load

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def low_rank(rows, columns, rank=4):
    """The tensors of each form for a matrix."""
    norm = {"dora_scale": 1 + numbers(rows, 1, scale=0.1).abs(), "alpha": torch.tensor(2.0)}
    lora = {"lora_up.weight": numbers(rows, rank, scale=0.1), "lora_down.weight": numbers(rank, columns, scale=0.1)}
    loha = {
        f"hada_w{place}_{side}": numbers(*shape, seed=place, scale=0.2)
        for place in (1, 2)
        for side, shape in (("a", (rows, rank)), ("b", (rank, columns)))
    }
    lokr = {"lokr_w1": numbers(8, 8, scale=0.2), "lokr_w2": numbers(rows // 8, columns // 8, scale=0.2)}
    return {
        "lora": lora,
        "lora with alpha": {**lora, "alpha": torch.tensor(2.0)},
        "lora with mid": {
            "lora_up.weight": numbers(rows, rank, 1, 1, scale=0.1),
            "lora_down.weight": numbers(rank, columns, 1, 1, scale=0.1),
            "lora_mid.weight": numbers(rank, rank, 1, 1, scale=0.5),
        },
        "dora": {**lora, **norm},
        "loha": loha,
        "dora of a loha": {**loha, **norm},
        "lokr": lokr,
        "dora of a lokr": {**lokr, **norm},
        "factors of a lokr": {
            "lokr_w1_a": numbers(8, rank, scale=0.3),
            "lokr_w1_b": numbers(rank, 8, scale=0.3),
            "lokr_w2_a": numbers(rows // 8, rank, scale=0.3),
            "lokr_w2_b": numbers(rank, columns // 8, scale=0.3),
            "alpha": torch.tensor(3.0),
        },
        "glora": {
            "a1.weight": numbers(rank, columns, scale=0.1),
            "a2.weight": numbers(columns, rank, scale=0.1),
            "b1.weight": numbers(rank, columns, scale=0.1),
            "b2.weight": numbers(rows, rank, scale=0.1),
        },
        "oft": {
            "oft_blocks": numbers(8, rows // 8, rows // 8, scale=0.02),
            "rescale": 1 + numbers(rows, 1, scale=0.1),
            "alpha": torch.tensor(0.5),
        },
        "boft": {
            "oft_blocks": numbers(2, rows // 8, 8, 8, scale=0.1),
            "rescale": 1 + numbers(rows, 1, scale=0.1),
            "alpha": torch.tensor(0.5),
        },
        "diff": {"diff": numbers(rows, columns, scale=0.05), "diff_b": numbers(rows, scale=0.05)},
        "norms": {"w_norm": numbers(rows, columns, scale=0.05), "b_norm": numbers(rows, scale=0.05)},
        "set": {"set_weight": numbers(rows, columns, scale=0.05)},
    }


def file_of(form):
    return {f"{stem}.{key}": t for stem, shape in SHAPES.items() for key, t in low_rank(*shape)[form].items()}


def in_dtype(dtype, path, fraction, monkeypatch):
    """A pair whose weights are in that dtype; without being told, ComfyUI takes fp32 for all of them on a CPU."""
    monkeypatch.setitem(comfy_load.WEIGHT_DTYPES, dtype, {"dtype": DTYPES[dtype]})
    classic, ours = pair(path, fraction, dtype)
    assert classic.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == DTYPES[dtype]
    return classic, ours


@pytest.fixture(autouse=True)
def no_error_in_the_log(caplog):
    """ComfyUI logs what it cannot compute and goes on: equal results would then mean nothing."""
    yield
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", low_rank(8, 8))
def test_every_form_of_patch_gives_comfyuis_latents(form, dtype, checkpoint, monkeypatch):
    if form == "boft" and mm.lora_compute_dtype(mm.get_torch_device()) is not torch.float32:
        pytest.skip("ComfyUI multiplies two dtypes there, which is an error in its log")
    classic, ours = in_dtype(dtype, checkpoint("flux", **SMALL), 0.25, monkeypatch)
    lora = file_of(form)
    plain = run(classic, steps=1)
    for strength in (1.0, -0.4):
        wanted = run(with_lora(classic, lora, strength), steps=1)
        assert not torch.equal(wanted, plain)
        assert_same(run(with_lora(ours, lora, strength), steps=1), wanted)
    assert_same(run(ours, steps=1), plain)


def test_patches_of_parts_of_a_matrix_give_comfyuis_latents(checkpoint, monkeypatch):
    """LoRAs of diffusers have q, k and v by themselves: each patches some rows of ComfyUI's one matrix."""
    stem = "transformer.transformer_blocks.0.attn"
    lora = {}
    for part in ("to_q", "to_k", "to_v"):
        lora[f"{stem}.{part}.lora_A.weight"] = numbers(4, 128, seed=ord(part[-1]), scale=0.2)
        lora[f"{stem}.{part}.lora_B.weight"] = numbers(128, 4, seed=ord(part[-1]), scale=0.2)
    classic, ours = in_dtype("bf16", checkpoint("flux", **SMALL), 0.0, monkeypatch)
    wanted = run(with_lora(classic, lora))
    assert not torch.equal(wanted, run(classic))
    patched = with_lora(ours, lora)
    assert [len(patches) for patches in patched.patches.values()] == [3]
    assert_same(run(patched), wanted)


CONV = "diffusion_model.input_blocks.1.0.in_layers.2"  # 320 -> 320, 3 x 3


@pytest.mark.parametrize("fraction", [1.0, 0.0])
@pytest.mark.parametrize("form", ["locon", "tucker locon", "tucker loha", "lokr", "dora", "diff"])
def test_patches_of_convolutions_give_comfyuis_latents(form, fraction, checkpoint):
    """Factors of four dimensions, with and without a core tensor (Tucker)."""
    rank = 4
    tensors = {
        "locon": {"lora_up.weight": (320, rank, 1, 1), "lora_down.weight": (rank, 320, 3, 3)},
        "tucker locon": {
            "lora_up.weight": (320, rank, 1, 1),
            "lora_mid.weight": (rank, rank, 3, 3),
            "lora_down.weight": (rank, 320, 1, 1),
        },
        "tucker loha": {
            "hada_w1_a": (rank, 320),
            "hada_w1_b": (rank, 320),
            "hada_t1": (rank, rank, 3, 3),
            "hada_w2_a": (rank, 320),
            "hada_w2_b": (rank, 320),
            "hada_t2": (rank, rank, 3, 3),
        },
        "lokr": {"lokr_w1": (8, 8), "lokr_w2": (40, 40, 3, 3)},  # ComfyUI cannot compute a Tucker LoKr
        "dora": {
            "lora_up.weight": (320, rank, 1, 1),
            "lora_down.weight": (rank, 320, 3, 3),
            "dora_scale": (320, 1, 1, 1),
        },
        "diff": {"diff": (320, 320, 3, 3), "diff_b": (320,)},
    }[form]
    lora = {f"{CONV}.{key}": numbers(*shape, seed=len(key), scale=0.3) for key, shape in tensors.items()}
    classic, ours = pair(checkpoint("sd15_unet", mult=(1,)), fraction)
    wanted = run(with_lora(classic, lora), steps=1)
    assert not torch.equal(run(classic, steps=1), wanted)
    assert_same(run(with_lora(ours, lora), steps=1), wanted)


# --- merges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8"])
def test_a_merge_by_blocks_of_a_flux_gives_comfyuis_latents(dtype, checkpoint, monkeypatch):
    ratios = {"double_blocks.0.": 0.2, "single_blocks.0.": 0.7, "img_in": 1.0, "final_layer.": 0.0}
    results = []
    first = in_dtype(dtype, checkpoint("flux", **SMALL), 0.25, monkeypatch)
    second = in_dtype(dtype, checkpoint("flux", **SMALL, seed=1), 0.25, monkeypatch)
    for one, other in zip(first, second, strict=True):
        (merged,) = specific.ModelMergeFlux1().merge(model1=one, model2=other, **ratios)
        results.append(run(merged))
    assert_same(results[1], results[0])
    assert not torch.equal(results[0], run(first[0]))


def test_a_merge_by_blocks_of_a_unet_gives_comfyuis_latents(checkpoint):
    paths = [checkpoint("sd15_unet", mult=(1,)), checkpoint("sd15_unet", mult=(1,), seed=1)]
    (classic, ours), (classic2, ours2) = (pair(path, 0.5) for path in paths)
    results = [
        run(merging.ModelMergeBlocks().merge(one, other, input=0.3, middle=0.5, out=0.9)[0], steps=1)
        for one, other in ((classic, classic2), (ours, ours2))
    ]
    assert_same(*results)
    assert not torch.equal(results[0], run(classic, steps=1))


def test_a_merge_of_text_encoders_gives_comfyuis_conditioning(checkpoint, monkeypatch):
    original, options = comfy.sd.load_clip, checkpoints.small_options(clip_layers=2)
    monkeypatch.setattr(comfy.sd, "load_clip", lambda **named: original(**named, model_options=dict(options)))
    paths = [checkpoint("clip_l", layers=2), checkpoint("clip_l", layers=2, seed=1)]
    classics = [comfy.sd.load_clip(ckpt_paths=[path]) for path in paths]
    ours = [comfy_load.load_clip([path], policy=budget(classics[0].patcher, 0.5)) for path in paths]
    for merge, arguments in ((merging.CLIPMergeSimple, (0.3,)), (merging.CLIPSubtract, (0.5,)), (merging.CLIPAdd, ())):
        results = [
            sampling.text_encode(getattr(merge(), merge.FUNCTION)(*clips, *arguments)[0], "a house")
            for clips in (classics, ours)
        ]
        assert_same(*results)
        assert not torch.equal(results[0][0], sampling.text_encode(classics[0], "a house")[0])


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_a_model_as_lora_differs_from_the_weight_in_the_models_dtype(dtype, checkpoint, monkeypatch):
    """The difference is to the weight in the model's own dtype, whatever the file has."""
    classic, ours = in_dtype(dtype, checkpoint("flux", **SMALL), 0.25, monkeypatch)
    other = comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL, seed=1))
    weights = comfy.hooks.get_patch_weights_from_model(other)
    results = []
    for model in (classic, ours):
        group = comfy.hooks.create_hook_model_as_lora(weights, None, 0.3, 0)
        positive, negative = sampling.conds(model)
        (positive,) = comfy.hooks.set_conds_props([positive], 1.0, "default", hooks=group)
        results.append(run(model, cfg=2.0, cond=(positive, negative)))
    assert_same(*results)
