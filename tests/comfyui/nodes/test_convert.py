"""The node that converts pickles: ComfyUI finds the same in both files, and Spillway loads the new one lazily."""

import os
import shutil

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import load_file

from kit.comfyui.pairs import SMALL, assert_same, run
from kit.nets import same
from kit.pickles import MARK, forms, malicious, model
from kit.shards import write_shards
from spillway.nodes.convert import FOLDERS, SpillwayConvertToSafetensors, _files
from spillway.nodes.load import SpillwayLoadDiffusionModel
from spillway.nodes.scan import SpillwayScanModels
from spillway.ops.files.disk_map import SourceError, locate
from spillway.ops.gather import memory_of


@pytest.fixture
def folder(models_dir):
    """A folder of ComfyUI's, empty again afterwards."""
    place = models_dir / "upscale_models"
    before = set(os.listdir(place))
    yield place
    for name in set(os.listdir(place)) - before:
        os.unlink(place / name)


def convert(name, **options):
    return SpillwayConvertToSafetensors.execute(file=f"upscale_models/{name}", **options).args[0]


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 2020"])
@pytest.mark.parametrize("form", ["plain", "state_dict", "only entry", "parallel"])
def test_comfyui_finds_the_same_in_both_files(form, old, folder):
    torch.save(forms(model(old=old))[form], folder / "m.pth", _use_new_zipfile_serialization=not old)
    assert "upscale_models/m.pth" in _files()
    with torch.inference_mode(False):
        theirs = comfy.utils.load_torch_file(str(folder / "m.pth"))
    found = comfy.utils.load_torch_file(convert("m.pth"))
    wanted = {key: value for key, value in theirs.items() if isinstance(value, torch.Tensor)}
    assert set(found) == set(wanted) and len(wanted) > 10
    assert all(same(found[key], wanted[key].detach()) for key in wanted)


def test_a_converted_model_is_the_pickles_and_stays_in_its_file(checkpoint, folder, models_dir):
    path = checkpoint("flux", **SMALL)
    torch.save({"state_dict": load_file(path)}, folder / "flux.ckpt")
    with pytest.raises(SourceError, match=r"flux\.ckpt: \.ckpt files are pickles.*Convert to Safetensors \(Spillway\)"):
        SpillwayLoadDiffusionModel.execute(unet_name=link(folder / "flux.ckpt", models_dir), weight_dtype="default")
    converted = convert("flux.ckpt", folder="diffusion_models")
    try:
        ours = SpillwayLoadDiffusionModel.execute(unet_name="flux.safetensors", weight_dtype="default").args[0]
        weights = list(ours.model.diffusion_model.parameters())
        assert sum(locate(weight.detach()) is not None for weight in weights) == len(weights)
        assert_same(run(ours), run(comfy.sd.load_diffusion_model(path)))
        with pytest.raises(SourceError, match=r"'flux\.safetensors' lies beside it: choose that one"):
            SpillwayLoadDiffusionModel.execute(unet_name="flux.ckpt", weight_dtype="default")
        assert convert("flux.ckpt", folder="diffusion_models") == converted
    finally:
        os.unlink(converted)
        os.unlink(models_dir / "diffusion_models" / "flux.ckpt")


def link(path, models_dir):
    os.link(path, models_dir / "diffusion_models" / path.name)
    return path.name


def test_a_diffusers_folder_of_pickled_parts_is_converted_in_one_go_and_loaded(checkpoint, models_dir):
    """The list has the index and not the parts. The loader takes the folder afterwards."""
    folder = models_dir / "diffusers" / "pickled" / "transformer"
    tensors = load_file(checkpoint("flux_as_diffusers", **SMALL))
    index = write_shards(folder, tensors, count=2, stem="diffusion_pytorch_model", pickled=True)
    name = f"diffusers/pickled/transformer/{index.name}"
    assert [one for one in _files() if one.startswith("diffusers/")] == [name]
    with pytest.raises(SourceError, match=f"only pickles here, such as '{index.name}'"):
        SpillwayLoadDiffusionModel.execute(unet_name="pickled", weight_dtype="default")
    before = SpillwayConvertToSafetensors.fingerprint_inputs(file=name)
    assert len(before) == 3
    path = SpillwayConvertToSafetensors.execute(file=name).args[0]
    assert path == str(folder / "diffusion_pytorch_model.safetensors")
    ours = SpillwayLoadDiffusionModel.execute(unet_name="pickled", weight_dtype="default").args[0]
    weights = [piece for weight in ours.model.diffusion_model.parameters() for piece in memory_of(weight.detach())]
    assert all(locate(piece) is not None for piece in weights)
    assert_same(run(ours), run(comfy.sd.load_diffusion_model(checkpoint("flux", **SMALL))))
    rows = SpillwayScanModels.execute(folder="diffusers", name_contains="pickled").args[0].splitlines()
    (row,) = [row for row in rows if index.name in row]
    assert "a pickle in 2 files: convert it" in row and len(rows) == 5
    shutil.rmtree(folder.parent)


def test_an_interrupt_leaves_no_file(folder):
    torch.save(model(), folder / "m.ckpt")
    before = set(os.listdir(folder))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        convert("m.ckpt")
    assert set(os.listdir(folder)) == before


def test_no_malicious_file_is_run_in_comfyui(folder, tmp_path):
    """ComfyUI lets torch's reader make more than torch itself does."""
    for name, (data, words) in malicious(tmp_path).items():
        (folder / "evil.pt").write_bytes(data)
        with pytest.raises(SourceError, match=words):
            convert("evil.pt")
        assert not (tmp_path / MARK).exists(), name


def test_no_other_folder_is_read_or_written():
    with pytest.raises(ValueError, match="in none of the folders"):
        SpillwayConvertToSafetensors.execute(file="../m.pt")
    with pytest.raises(FileNotFoundError):
        SpillwayConvertToSafetensors.execute(file="upscale_models/../../m.pt")
    with pytest.raises(ValueError, match="expected one of beside the file"):
        SpillwayConvertToSafetensors.execute(file="upscale_models/m.pt", folder="/etc")
    assert "custom_nodes" not in FOLDERS
