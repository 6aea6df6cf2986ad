"""Files that ComfyUI converts in place as it loads them: model and saved file are the converted ones at any time."""

import mmap

import comfy.memory_management
import comfy.sd
import pytest
import safetensors.torch
import torch

from kit.comfyui.pairs import SMALL, assert_same, budget, pair, run
from kit.comfyui.saving import assert_same_tensors, comfyui_save, read, save
from spillway.ops.files import mapped_file as mapping
from spillway.ops.files.disk_map import locate
from spillway.patcher.comfyui.loading import loader_overrides
from spillway.patcher.comfyui.loading.load import load_diffusion_model

CONVERTED = "diffusion_model.final_layer.adaLN_modulation.1.weight"
# The weight that is converted is larger than a page, and in the dtype that a CPU computes in: it is used in place.
FLUX = {**SMALL, "dtype": torch.float32}


@pytest.fixture
def in_place(monkeypatch):
    """Let ComfyUI convert the tensors themselves, as it does those of other architectures, and no copies of them."""
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", False, raising=False)
    monkeypatch.setattr(loader_overrides, "convert_lazily", lambda convert, *args, **kwargs: convert(*args, **kwargs))


@pytest.mark.usefixtures("in_place")
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
def test_a_file_with_the_names_of_diffusers_is_converted_at_any_time(fraction, checkpoint):
    """First run, next run, after every way to give memory back, and the saved file, bit for bit."""
    classic, ours = pair(checkpoint("flux_as_diffusers", **FLUX), fraction)
    place = locate(ours.model.get_parameter(CONVERTED).detach())
    assert place is not None and place[0].written(*place[1:])  # else this test is of nothing
    wanted, (wanted_file, _) = run(classic), read(comfyui_save(classic))
    for give_back in (lambda: None, ours.dynamic.free, ours.dynamic.release, ours.detach):
        give_back()
        assert_same(run(ours), wanted)
        assert_same_tensors(read(save(ours))[0], wanted_file)
    assert any("written into" in line for line in ours.dynamic.ledger.decisions)


def test_names_of_diffusers_and_of_bfl_make_one_model(checkpoint):
    plain, named = (checkpoint(kind, **FLUX) for kind in ("flux", "flux_as_diffusers"))
    wanted = run(comfy.sd.load_diffusion_model(plain))
    for load in (comfy.sd.load_diffusion_model, load_diffusion_model):
        assert_same(run(load(named)), wanted)


@pytest.mark.usefixtures("in_place")
def test_what_is_converted_in_a_map_that_cannot_be_written_is_copied(checkpoint, monkeypatch):
    """On a system without room for a private map, what is converted is copied, and nothing else."""
    path, make = checkpoint("flux_as_diffusers", **FLUX), mapping.MappedFile

    def refuse(*args, **kwargs):
        if kwargs.get("access") != mmap.ACCESS_READ:
            raise OSError(12, "Cannot allocate memory")
        return make(*args, **kwargs)

    classic = comfy.sd.load_diffusion_model(path)
    monkeypatch.setattr(mapping, "MappedFile", refuse)
    ours = load_diffusion_model(path, policy=budget(classic, 0.0))
    monkeypatch.undo()
    parameters = {name: parameter.detach() for name, parameter in ours.model.named_parameters()}
    assert locate(parameters[CONVERTED]) is None
    (disk_map,) = ours.model.spillway_maps
    assert disk_map.read_only
    whole = [key for key, spec in ((key, disk_map.spec(key)) for key in disk_map.keys()) if "to_" not in key]  # noqa: SIM118
    assert sum(locate(parameter) is not None for parameter in parameters.values()) >= len(whole) // 2
    for _ in range(2):
        assert_same(run(ours), run(classic))
        ours.dynamic.release()
    assert_same_tensors(safetensors.torch.load_file(save(ours)), read(comfyui_save(classic))[0])
