"""Models with the names of diffusers: ComfyUI's weights, bit for bit, in pieces that stay in their file."""

import comfy.model_detection
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file

from kit.comfyui import checkpoints
from kit.comfyui.loras import with_lora
from kit.comfyui.pairs import SMALL, assert_same, counters, pair, run
from kit.comfyui.saving import assert_same_tensors, comfyui_save, read, save
from kit.nets import same
from spillway.ops.files.disk_map import SourceError, locate
from spillway.ops.gather import memory_of
from spillway.ops.joined_weight import JoinedWeight
from spillway.patcher.comfyui.loading.diffusers_names import convert_lazily
from spillway.patcher.comfyui.loading.load import load_diffusion_model

MAPS = {
    "flux": lambda: comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 1, "hidden_size": 8}),
    "sd3": lambda: comfy.utils.mmdit_to_diffusers({"depth": 1, "num_blocks": 2}),
    "auraflow": lambda: comfy.utils.auraflow_to_diffusers({"n_double_layers": 1, "n_layers": 2}),
    "pixart": lambda: comfy.utils.pixart_to_diffusers({"depth": 2}),
    "z_image": lambda: comfy.utils.z_image_to_diffusers({"n_layers": 2, "dim": 8}),
}


MAP = "z_image_to_diffusers"  # which older versions lack


def random_file(name):
    """Tensors under all names that ComfyUI's map of an architecture knows, of the sizes that it asks for."""
    torch.manual_seed(3)
    tensors = {}
    for key, target in MAPS[name]().items():
        place = None if isinstance(target, str) else target[1]
        rows = 64 if place is None else place[2]
        tensors[key] = torch.randn(rows, 3) if key.endswith("weight") else torch.randn(rows)
    for key in tensors:
        if "pos_embed" in key:
            tensors[key] = torch.randn(64, 2, 2, 2)
        if name == "flux" and key.startswith("x_embedder"):
            tensors[key] = torch.randn(8, 3) if key.endswith("weight") else torch.randn(8)
        if name == "z_image" and key.startswith("noise_refiner.0.attention.to_"):
            tensors[key] = torch.randn(8, 3)
    return tensors


@pytest.mark.parametrize("name", [name for name in MAPS if name != "z_image" or hasattr(comfy.utils, MAP)])
def test_comfyuis_own_conversion_without_reading(name):
    """Each weight is ComfyUI's, what is left over is the same, and every piece is a view of what came in."""
    with torch.inference_mode(False):  # as the tensors of a map are: they count writes
        tensors = {**random_file(name), "left.over": torch.randn(2)}
    theirs = {key: value.clone() for key, value in tensors.items()}
    wanted = comfy.model_detection.convert_diffusers_mmdit(theirs, "")
    before = {key: value._version for key, value in tensors.items()}
    given = dict(tensors)
    got = convert_lazily(comfy.model_detection.convert_diffusers_mmdit, given, "")
    assert set(got) == set(wanted) and set(given) == set(theirs)
    assert all(same(got[key].clone(), wanted[key]) for key in wanted)
    storages = {value.untyped_storage().data_ptr() for value in tensors.values()}
    pieces = [piece for weight in got.values() for piece in memory_of(weight)]
    assert all(piece.untyped_storage().data_ptr() in storages for piece in pieces)
    assert before == {key: value._version for key, value in tensors.items()}
    assert name == "pixart" or any(isinstance(weight, JoinedWeight) for weight in got.values())


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_read_at_load_and_the_picture_and_the_file_are_comfyuis(dtype, fraction, checkpoint):
    path = checkpoint("flux_as_diffusers", **SMALL, dtype=dtype)
    classic, ours = pair(path, fraction)
    weights = {name: value.detach() for name, value in ours.model.diffusion_model.named_parameters()}
    joined = [weight for weight in weights.values() if isinstance(weight, JoinedWeight)]
    assert len(joined) > 5
    assert all(locate(piece) is not None for weight in weights.values() for piece in memory_of(weight))
    (disk_map,) = ours.model.spillway_maps
    assert not disk_map.written(0, disk_map.file_bytes)
    wanted, (wanted_file, _) = run(classic), read(comfyui_save(classic))
    for give_back in (lambda: None, ours.dynamic.free, ours.dynamic.release, ours.detach):
        give_back()
        assert_same(run(ours), wanted)
        if dtype is torch.float32:  # ComfyUI saves what a CPU computes in
            assert_same_tensors(read(save(ours))[0], wanted_file)
    if not fraction:
        assert counters(ours).bytes_streamed > 0


def test_a_lora_and_int8_on_joined_weights(checkpoint, models_dir):
    path, plain = (checkpoint(kind, **SMALL) for kind in ("flux_as_diffusers", "flux"))
    lora = load_file(checkpoints.lora(models_dir / "loras" / "joined.safetensors", plain, rank=4))
    classic, ours = pair(path, 0.5)
    assert_same(run(with_lora(ours, lora, 0.7)), run(with_lora(classic, lora, 0.7)))
    assert_same(
        run(load_diffusion_model(path, "int8")),
        run(load_diffusion_model(plain, "int8")),
    )


@pytest.mark.parametrize("name", ["img_attn.qkv.weight", "img_mlp.0.weight"], ids=["joined", "whole"])
def test_a_write_goes_into_the_pieces_of_a_weight(name, checkpoint, tmp_path):
    """Before and while the model is used, into the whole, rows and single ones; also after memory was given back.

    Compared with a file that has these numbers. ComfyUI's dynamic models overlook writes into what is resident, and its
    classic ones round each write to the dtype of the device.
    """
    options = {**SMALL, "dtype": torch.float32}
    name = f"double_blocks.0.{name}"
    whole = load_file(checkpoint("flux", **options))
    numbers = whole[name].clone()
    classic, ours = pair(checkpoint("flux_as_diffusers", **options), 0.5)
    wanted = run(classic)
    for round_ in range(2):
        for weight in (numbers, ours.model.diffusion_model.get_parameter(name)):
            with torch.no_grad():
                weight[3:200].mul_(0.5)
                weight[150].add_(1.0)
                weight.add_(0.01)
        path = checkpoints.write(tmp_path / f"{round_}.safetensors", {**whole, name: numbers})
        before, wanted = wanted, run(comfy.sd.load_diffusion_model(path))
        assert not torch.equal(wanted, before)
        assert_same(run(ours), wanted)
        ours.dynamic.release()
        assert_same(run(ours), wanted)
        weight = ours.model.state_dict()[f"diffusion_model.{name}"]
        assert isinstance(weight, JoinedWeight) == ("qkv" in name)
        assert same(weight.clone(), numbers)


def test_a_missing_part_of_a_joined_weight_is_an_error_that_names_it(checkpoint, tmp_path):
    """ComfyUI would fill the gap with whatever is in memory."""
    whole = load_file(checkpoint("flux_as_diffusers", **SMALL))
    for missing in ("transformer_blocks.0.attn.to_k.weight", "single_transformer_blocks.0.attn.to_v.bias"):
        tensors = {key: value for key, value in whole.items() if key != missing}
        path = checkpoints.write(tmp_path / "m.safetensors", tensors)
        with pytest.raises(SourceError, match=r"m\.safetensors: '.*' is made of several tensors.*only a part of them"):
            load_diffusion_model(path)
