"""Files that we quantise, in ComfyUI as most users have it: with dynamic VRAM on, where the run has it."""

import comfy.sd
import pytest

from kit.comfyui.on_device import comfyuis_dynamic_models
from kit.comfyui.pairs import assert_same, classic_model, run
from kit.comfyui.saving import save
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.quantise.formats import FORMATS

# ComfyUI's dynamic models quantise layers of up to 16 KiB once more, which rounds 4 bits again. Real models have none.
LARGE_ENOUGH = {"hidden": 256, "depth": 1, "depth_single": 1}


@pytest.mark.usefixtures("output")
@pytest.mark.parametrize("name", FORMATS)
def test_comfyuis_own_patchers_agree_on_a_file_that_was_saved_in_a_format(name, checkpoint):
    model = load_diffusion_model(checkpoint("flux", **LARGE_ENOUGH), name)
    wanted = run(model)
    saved = save(model, name)
    assert_same(run(classic_model(saved)), wanted)
    with comfyuis_dynamic_models():
        dynamic = comfy.sd.load_diffusion_model(saved)
    assert_same(run(dynamic), wanted)
