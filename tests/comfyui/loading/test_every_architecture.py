"""Every diffusion model that ComfyUI supports, on a card of shapes: two steps, each weight patched.

No operation mixes devices or dtypes, no weight leaves host memory but by a loan, and every weight is asked for.
"""

from fnmatch import fnmatch

import comfy.supported_models
import pytest

from kit.comfyui.architectures import texts
from kit.comfyui.architectures.fake_card import CARD, Reads, dynamic_on_the_card, on_the_card
from kit.comfyui.architectures.table import build, models

pytestmark = pytest.mark.usefixtures("weights_in_layers")

# Their modules are those of the other, in other numbers or widths.
SAME = {
    **dict.fromkeys(("SD15_instructpix2pix", "SD20", "Stable_Zero123"), "SD15"),
    **dict.fromkeys(("LotusD", "SD21UnclipL", "SD21UnclipH"), "SDXL"),
    **dict.fromkeys(("SDXL_instructpix2pix", "SDXLRefiner", "SSD1B", "KOALA_700M", "KOALA_1B", "Segmind_Vega"), "SDXL"),
    **dict.fromkeys(("SV3D_u", "SV3D_p"), "SVD_img2vid"),
    **dict.fromkeys(("FluxInpaint", "FluxSchnell", "LongCatImage"), "Flux"),
    **dict.fromkeys(("HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V"), "HunyuanVideo"),
    "HunyuanVideo15_SR_Distilled": "HunyuanVideo15",
    "CosmosI2V": "CosmosT2V",
    "CosmosI2VPredict2": "CosmosT2IPredict2",
    "WAN21_FlowRVS": "WAN21_T2V",
    "WAN21_FunControl2V": "WAN21_I2V",
    "WAN22_Camera": "WAN21_Camera",
    "Hunyuan3Dv2mini": "Hunyuan3Dv2",
    "Kandinsky5Image": "Kandinsky5",
    "CogVideoX_Inpaint": "CogVideoX_I2V",
}
# They take sizes from numbers on the device, of which a card of shapes has none.
BY_NUMBERS = {
    "MiniMaxH3": "chooses its segments by timesteps",
    "SeedVR2": "windows by shapes that are tensors",
    "ACEStep15": "packs voices by their order",
}
# What one step with these inputs never asks for, by patterns of its name.
NOT_ASKED = {
    "StableAudio": {"seconds_*": "conditions, made before sampling"},
    "StableAudio3": {"seconds_*": "conditions, made before sampling"},
    "Hunyuan3Dv2_1": {"diffusion_model.t_embedder.cond_proj": "guidance as an input, which the sampler does not give"},
    "Trellis2": {"diffusion_model.img2shape*": "the stages after this one, of voxels that it finds"},
    "Omnigen2": {"diffusion_model": "numbers of those pictures", "diffusion_model.ref_image*": "pictures to edit"},
    "Boogu": {"diffusion_model": "numbers of those pictures", "diffusion_model.ref_image*": "pictures to edit"},
    "Anima": {"diffusion_model.llm_adapter*": "called with a text, before sampling"},
    "HiDreamO1": {"diffusion_model.visual*": "pictures to edit"},
    "ACEStep": {"diffusion_model.*": "parts of its attention that no version of it calls"},
    "RT_DETR_v4": {"diffusion_model.decoder*": "layers that only training reads"},
    "LTXAV": {"diffusion_model.*": "connectors, which belong to its text encoder"},
    "WAN22_S2V": {"diffusion_model.*": "audio layers of blocks that the short model lacks, and pose frames"},
    "WAN21_SCAIL2": {"diffusion_model.patch_embedding_mask": "masks"},
    "WAN22_WanDancer": {
        "diffusion_model.*": "the first picture, and audio layers of blocks that the short model lacks"
    },
    "SAM3": {"*": "tracking in videos"},
    "SAM31": {"*": "tracking in videos"},
}

# Text encoders whose classes are those of the other, in other numbers, so they run with --slow.
ALIKE = {
    "Mistral3Small24B": "Llama2",
    **dict.fromkeys(
        ("Qwen3_06B_ACE15", "Qwen3_2B_ACE15_lm", "Qwen3_4B", "Qwen3_4B_ACE15_lm", "Ovis25_2B"), "Qwen3_06B"
    ),
    "Gemma3_12B": "Gemma3_4B_Vision",
}
NOT_ASKED_BY_TEXTS = {
    "Gemma3_4B_Vision": {"vision_model*": "pictures", "multi_modal_projector*": "pictures"},
    "Gemma3_12B": {"vision_model*": "pictures", "multi_modal_projector*": "pictures"},
    "Qwen25_7BVLI": {"visual*": "pictures"},
}

RUN = sorted(set(models()) - set(SAME) - set(BY_NUMBERS))


def test_the_table_has_every_model_that_comfyui_supports():
    names = {model.__name__ for model in comfy.supported_models.models}
    assert names <= set(models()), "add them to tests/kit/comfyui/architectures"
    assert set(SAME.values()) <= set(RUN) and set(NOT_ASKED) <= set(RUN)
    assert not set(ALIKE.values()) & set(ALIKE)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", RUN)
def test_two_steps_on_a_card(name, monkeypatch):
    if name not in {model.__name__ for model in comfy.supported_models.models}:
        pytest.skip(f"this ComfyUI has no {name}")
    with on_the_card(monkeypatch):
        two_steps(*build(name), NOT_ASKED.get(name, {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in sorted(texts.MODELS)]
)
def test_two_encodings_on_a_card(name, monkeypatch):
    with on_the_card(monkeypatch):
        two_steps(*texts.build(name), NOT_ASKED_BY_TEXTS.get(name, {}))


def two_steps(model, step, known):
    """Run and check both. known: patterns of the bundles that are not asked for."""
    patcher = dynamic_on_the_card(model)  # the engine closes with its last patcher
    dynamic = patcher.dynamic
    params = [param for bundle in dynamic.bundles for param in bundle.params]
    seen = {}

    def patch(key):
        return lambda weight: seen.setdefault(key, []).append((weight.device, weight.dtype)) or weight

    dynamic.set_patches({param.key: patch(param.key) for param in params})
    with Reads(dynamic) as reads:
        for _ in range(2):
            step(model)
    assert not reads.beside
    asked = {bundle.name for bundle in dynamic.bundles if dynamic.residency.is_resident(bundle)}
    never = {bundle.name for bundle in dynamic.bundles} - asked
    assert asked and not [bundle for bundle in never if not any(fnmatch(bundle, pattern) for pattern in known)]
    assert bool(never) == bool(known)
    for param in params:
        wanted = [(CARD, param.final.dtype)] if dynamic.by_key[param.key].name in asked else []
        assert seen.get(param.key, []) == wanted, param.key
    assert all(buffer.device == CARD for buffer in model.buffers())
    dynamic.close()
    assert all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
