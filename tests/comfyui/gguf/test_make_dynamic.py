"""Make Dynamic with the models of ComfyUI-GGUF: the same bits, streamed.

One form runs always, on a stand-in. The other runs the pack itself, where $SPILLWAY_COMFYUI_GGUF names a checkout.
"""

from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch

from kit.comfyui import checkpoints, comfyui_gguf
from kit.comfyui.pairs import assert_same, counters, run
from kit.comfyui.sampling import text_encode
from kit.gguf_files import quantised_copy, write_gguf
from spillway.nodes.load import SpillwayMakeDynamic
from spillway.ops.gguf.dequantise import IN_TORCH
from spillway.ops.gguf.weight import GgufWeight
from spillway.ops.lending.layer import DynamicLayer
from spillway.patcher.policy import Policy

WIDE = {"hidden": 256, "depth": 1, "depth_single": 1}
KINDS = [kind for kind in IN_TORCH if kind != "Q4_K"]
the_pack = pytest.mark.skipif(bool(comfyui_gguf.missing()), reason=comfyui_gguf.missing())


def make_dynamic(model, budget=None, clip=None):
    return SpillwayMakeDynamic.execute(model=model, clip=clip, policy=Policy(vram_bytes=budget)).args


def in_blocks(patcher):
    """Count the weights that lie in blocks."""
    params = [param for bundle in patcher.dynamic.bundles for param in bundle.params]
    return sum(isinstance(param.source, GgufWeight) for param in params)


@pytest.mark.parametrize(("kind", "chosen"), [("Q4_K", None), ("Q5_1", None), ("IQ4_XS", torch.float32)])
def test_a_stand_in_gives_the_same_bits_and_is_left_alone(kind, chosen, checkpoint, monkeypatch):
    monkeypatch.setattr(comfyui_gguf.Linear, "dequant_dtype", chosen)
    path = checkpoint("flux", **WIDE)
    written, _ = quantised_copy(comfy.utils.load_torch_file(path), kind)
    model = comfy.sd.load_diffusion_model(path)
    model.cached_patcher_init = None
    theirs = comfyui_gguf.stand_in(model, written)
    wanted = run(theirs, steps=1)
    before = dict(theirs.model.named_parameters())
    for budget in (None, 0):
        (ours, *_) = make_dynamic(theirs, budget)
        assert_same(run(ours, steps=1), wanted)
        assert in_blocks(ours) > 10
        layer = ours.model.diffusion_model.double_blocks[0].img_attn.qkv
        assert isinstance(layer, DynamicLayer) and not isinstance(layer, comfyui_gguf.GGMLLayer)
    assert dict(theirs.model.named_parameters()) == before and counters(ours).bytes_streamed > 0
    assert_same(run(theirs, steps=1), wanted)


@pytest.fixture
def file(checkpoint):
    """`file("Q4_K")`: the name of a small Flux among the diffusion models."""
    made = []

    def make(kind):
        written, _ = quantised_copy(comfy.utils.load_torch_file(checkpoint("flux", **WIDE)), kind)
        place = Path(folder_paths.get_folder_paths("diffusion_models")[0])
        made.append(Path(write_gguf(place / f"flux-{kind}.gguf", written)))
        return made[-1].name

    yield make
    for path in made:
        path.unlink()


@the_pack
@pytest.mark.parametrize("kind", ["Q4_K", *KINDS])
@pytest.mark.parametrize("chosen", ["default", "float32"])
def test_the_packs_models_give_the_same_bits(kind, chosen, file):
    (theirs,) = comfyui_gguf.pack().UnetLoaderGGUFAdvanced().load_unet(file(kind), chosen, "default", False)
    wanted = run(theirs, steps=1)
    for budget in (None, 0) if kind == "Q4_K" else (0,):
        (ours, *_) = make_dynamic(theirs, budget)
        assert_same(run(ours, steps=1), wanted)
        assert in_blocks(ours) > 10 and (budget is None or counters(ours).bytes_streamed > 0)
    assert_same(run(theirs, steps=1), wanted)


@the_pack
def test_the_packs_loras_go_with_the_model(file, checkpoint):
    """Both add the LoRA to the numbers in full precision, so no more differs than the order of a sum."""
    lora = comfy.utils.load_torch_file(checkpoint("lora", base=checkpoint("flux", **WIDE)))
    (theirs,) = comfyui_gguf.pack().UnetLoaderGGUF().load_unet(file("Q4_K"))
    without = run(theirs, steps=1)
    patched = comfy.sd.load_lora_for_models(theirs, None, lora, 0.8, 0)[0]
    wanted = run(patched, steps=1)
    (ours, *_) = make_dynamic(patched, 0)
    got = run(ours, steps=1)
    assert float((wanted - without).norm() / without.norm()) > 0.01
    assert float((got - wanted).norm() / (wanted - without).norm()) < 0.005
    assert_same(run(make_dynamic(theirs, 0)[0], steps=1), without)


@the_pack
def test_the_packs_clip_gives_the_same_conditioning(checkpoint, monkeypatch):
    tensors = comfy.utils.load_torch_file(checkpoint("clip_l", layers=2))
    plain = {key: value for key, value in tensors.items() if "embedding" in key}  # the pack fails on blocks of these
    written = {**quantised_copy(tensors, "Q8_0")[0], **plain}
    path = Path(folder_paths.get_folder_paths("text_encoders")[0]) / "clip_l.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, written, {"general.architecture": "t5"})  # which keeps these names as they are
    original = comfy.sd.load_text_encoder_state_dicts
    options = checkpoints.small_options(clip_layers=2)

    def load(*args, **kwargs):
        kwargs["model_options"] = {**kwargs["model_options"], **options}
        return original(*args, **kwargs)

    monkeypatch.setattr(comfy.sd, "load_text_encoder_state_dicts", load)
    (theirs,) = comfyui_gguf.pack().CLIPLoaderGGUF().load_clip("clip_l.gguf")
    path.unlink()
    wanted = text_encode(theirs, "a cat in a hat")
    model = comfy.sd.load_diffusion_model(checkpoint("flux", **WIDE))
    ours = make_dynamic(model, 0, theirs)[1]
    assert_same(text_encode(ours, "a cat in a hat"), wanted)
    assert in_blocks(ours.patcher) > 10
