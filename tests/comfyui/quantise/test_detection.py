"""ComfyUI knows a model by the shapes of its weights. Packed into 4 bits, no such shape is another one."""

import comfy.model_detection
import comfy.supported_models
import pytest

from kit.comfyui.architectures.fake_card import on_the_card
from kit.comfyui.architectures.table import build, models
from spillway.patcher.comfyui.quantise.formats import FORMATS
from spillway.patcher.comfyui.quantise.layers import KitchenLayers, chosen, rule_of

pytestmark = pytest.mark.usefixtures("weights_in_layers")

# Two of their numbers lie in a byte.
PACKED = [name for name, known in FORMATS.items() if known.bits < 8]
# One for each class of models that is known by a width.
QUICK = ("SD15", "LTXV", "LTXAV", "StableAudio3", "Stable_Cascade_B", "Flux")


def detected(state):
    config = comfy.model_detection.detect_unet_config(dict(state), "")
    config.pop("allow_fp16", None)  # by numbers, of which a card of shapes has none
    return config


# ComfyUI reads `cc_projection` beside the first one's U-Net. It knows the others by blocks and a prefix that the short
# ones of the table lack, and by no width.
NAMES = sorted(set(models()) - {"Stable_Zero123", "SeedVR2", "PixelDiTT2I"})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_comfyui_knows_a_model_whose_layers_are_packed(name, monkeypatch):
    if name not in {model.__name__ for model in comfy.supported_models.models}:
        pytest.skip(f"this ComfyUI has no {name}")
    with on_the_card(monkeypatch):
        model = build(name)[0]
        state = model.diffusion_model.state_dict()
        wanted = detected(state)
        for form in PACKED:
            layers, packed = KitchenLayers(FORMATS[form], *rule_of(model)), dict(state)
            for layer, weight, _ in chosen(model, layers):
                key = f"{layer.removeprefix('diffusion_model.')}.weight"
                packed[key] = packed[key].new_empty(weight.shape[0], weight.shape[1] // 2)
            assert detected(packed) == wanted
