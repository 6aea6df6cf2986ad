"""Loaders of what stands beside a model: ComfyUI's results bit for bit, while the weights stay in their file."""

import comfy.clip_vision
import comfy.controlnet
import comfy.sd
import comfy.utils
import nodes as comfyui_nodes
import pytest
import torch
from comfy_extras.nodes_model_patch import ModelPatchLoader, USOStyleReference
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader

from kit.comfyui import checkpoints, sampling
from kit.comfyui.pairs import assert_same, run
from spillway.ops.files.disk_map import SourceError, locate
from spillway.ops.gather import inner_tensors
from spillway.patcher.comfyui.loading import companions
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.policy import Policy

NOTHING = Policy(vram_bytes=0, pinned_bytes=0)
OUTPUTS = ("last_hidden_state", "image_embeds", "penultimate_hidden_states", "all_hidden_states")


def lies_in_its_file(dynamic, least=0.9):
    """Whether the weights lie in a map, and were streamed."""
    params = [param for bundle in dynamic.bundles for param in bundle.params]
    total = sum(param.source.nbytes for param in params)
    mapped = sum(p.source.nbytes for p in params if all(locate(part) is not None for part in inner_tensors(p.source)))
    assert mapped >= least * total, (mapped, total)
    return dynamic.ledger.counters.steps > 0 and dynamic.peak_resident_bytes == 0


# The published size, in the dtype that it is published in; and small ones, of which ComfyUI rounds those of fp32.
SIGLIPS = {
    "small": (checkpoints.SMALL_SIGLIP, {"small": True}),
    "small fp32": (checkpoints.SMALL_SIGLIP, {"small": True, "dtype": torch.float32}),
    "real": (checkpoints.SIGLIP, {"small": False}),
}
EACH_SIGLIP = ["small", "small fp32", pytest.param("real", marks=pytest.mark.slow)]


def siglips(which, checkpoint):
    """Load a SigLIP by ComfyUI and by the pack, which lets nothing stay."""
    config, options = SIGLIPS[which]
    path = checkpoint("siglip", **options)
    with checkpoints.encoders_as(config):
        return comfy.clip_vision.load(path), companions.load_clip_vision(path, NOTHING)


def reads_are_loans(encoder):
    """Whether a SigLIP's table of places, which no layer is called for, was lent for each picture.

    Where a CPU can use it as it lies in its file, it stands there itself.
    """
    dynamic = encoder.dynamic
    params = [param for bundle in dynamic.bundles for param in bundle.params]
    places = next(param for param in params if param.key.endswith("position_embedding.weight"))
    return dynamic.ledger.counters.reads > 0 or (dynamic.backend.in_place and places.usable_in_place())


@pytest.mark.parametrize("which", EACH_SIGLIP)
def test_a_siglip_encodes_as_comfyuis_does(which, checkpoint):
    encoders = siglips(which, checkpoint)
    picture = sampling.image(100, 80)
    wanted, got = (encoder.encode_image(picture) for encoder in encoders)
    for name in OUTPUTS:
        assert wanted[name].std() > 0
        assert_same(got[name], wanted[name])
    assert lies_in_its_file(encoders[1].patcher.dynamic) and reads_are_loans(encoders[1].patcher)


@pytest.mark.parametrize("which", EACH_SIGLIP)
def test_uso_gives_comfyuis_latents(which, checkpoint, models_dir):
    """From the picture to the latents: a SigLIP reads it, USO's patch projects what three of its layers say."""
    flux, encoders = checkpoint("flux", hidden=128, depth=1, depth_single=1), siglips(which, checkpoint)
    config = SIGLIPS[which][0]
    places, width = (config["image_size"] // config["patch_size"]) ** 2, config["hidden_size"]
    patch = models_dir / "model_patches" / f"uso-of-{which.replace(' ', '-')}.safetensors"
    checkpoints.patch_uso(patch, hidden=128, places=places, width=width)
    with checkpoints.small_patches(uso_hidden=128, uso_siglip=(places, width)):
        patches = ModelPatchLoader().load_model_patch(patch.name)[0], companions.load_model_patch(patch.name, NOTHING)
    models = comfy.sd.load_diffusion_model(flux), load_diffusion_model(flux, policy=NOTHING)
    outputs = []
    for model, encoder, patch_model in zip(models, encoders, patches, strict=True):
        encoded = encoder.encode_image(sampling.image(100, 80))
        outputs.append(run(USOStyleReference().apply_patch(model, patch_model, encoded)[0]))
    assert_same(outputs[1], outputs[0])
    assert not torch.equal(outputs[0], run(models[0]))
    other = USOStyleReference().apply_patch(models[1], patches[1], encoders[1].encode_image(sampling.image(90, 90)))[0]
    assert not torch.equal(run(other), outputs[0]), "else the picture is lost on the way"
    assert all(lies_in_its_file(p.dynamic) for p in (models[1], encoders[1].patcher, patches[1]))
    assert reads_are_loans(encoders[1].patcher)


def controlled(model, controlnet):
    conds = comfyui_nodes.ControlNetApplyAdvanced().apply_controlnet(
        *sampling.conds("sd15"), controlnet, sampling.image(256, 256), 0.8, 0.0, 1.0
    )
    return run(model, cond=conds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_controlnet_gives_comfyuis_latents(dtype, checkpoint):
    path, unet = checkpoint("sd15_controlnet", dtype=dtype), checkpoint("sd15_unet", mult=(1,))
    classic = comfy.sd.load_diffusion_model(unet)
    wanted = controlled(classic, comfy.controlnet.load_controlnet(path))
    ours, controlnet = load_diffusion_model(unet, policy=NOTHING), companions.load_controlnet(path, NOTHING)
    assert_same(controlled(ours, controlnet), wanted)
    assert not torch.equal(wanted, run(classic, cond=sampling.conds("sd15")))
    assert lies_in_its_file(controlnet.control_model_wrapped.dynamic)
    # A model of ComfyUI's takes it too.
    assert_same(controlled(classic, controlnet), wanted)


def test_keys_that_a_controlnet_lacks_are_logged_and_have_memory(checkpoint, tmp_path, caplog):
    """ComfyUI fills some of them from the model that is controlled."""
    tensors = comfy.utils.load_torch_file(checkpoint("sd15_controlnet"))
    lost = "middle_block.0.in_layers.2.weight"
    tensors.pop(lost)
    path = str(tmp_path / "lacks.safetensors")
    comfy.utils.save_torch_file(tensors, path)
    caplog.set_level("INFO")
    controlnet = companions.load_controlnet(path)
    assert f"missing controlnet keys: ['{lost}']" in caplog.text
    assert not dict(controlnet.control_model.named_parameters())[lost].is_meta


def test_a_t2i_adapter_is_loaded_as_a_whole(tmp_path):
    from comfy.t2i_adapter.adapter import Adapter_light

    path = str(tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    state = Adapter_light(cin=192, channels=[320, 640, 1280, 1280], nums_rb=4).state_dict()
    comfy.utils.save_torch_file({name: tensor.half() for name, tensor in state.items()}, path)
    wanted, got = comfy.controlnet.load_controlnet(path), companions.load_controlnet(path)
    x = sampling.image(64, 64).movedim(-1, 1)
    assert_same(got.t2i_model(x)["input"], wanted.t2i_model(x)["input"])
    assert all(locate(parameter.data) is None for parameter in got.t2i_model.parameters())


def test_an_audio_encoder_gives_comfyuis_features(checkpoint):
    from comfy.audio_encoders.audio_encoders import load_audio_encoder_from_sd

    path = checkpoint("wav2vec")
    with checkpoints.two_layers_of_audio():
        encoders = (
            load_audio_encoder_from_sd(comfy.utils.load_torch_file(path)),
            companions.load_audio_encoder(path, NOTHING),
        )
    sound = torch.randn(1, 1, 8000, generator=torch.Generator().manual_seed(1))
    wanted, got = (encoder.encode_audio(sound, 16000) for encoder in encoders)
    assert_same(got["encoded_audio"], wanted["encoded_audio"])
    assert lies_in_its_file(encoders[1].patcher.dynamic)


def test_a_style_model_gives_comfyuis_conditioning(checkpoint):
    path = checkpoint("redux")

    class Encoded:
        last_hidden_state = torch.randn(1, 9, 1152, generator=torch.Generator().manual_seed(2))

    styles = comfy.sd.load_style_model(path), companions.load_style_model(path, NOTHING)
    wanted, got = (style.get_cond(Encoded) for style in styles)
    assert_same(got, wanted)
    assert lies_in_its_file(styles[1].model)


def test_an_upscale_model_gives_comfyuis_picture(checkpoint, models_dir):
    path = models_dir / "upscale_models" / "small.safetensors"
    checkpoints.compact(path)
    wanted_model = UpscaleModelLoader.execute(path.name).args[0]
    ours = companions.load_upscale_model(str(path), NOTHING)
    picture = sampling.image(40, 24)
    wanted, got = (ImageUpscaleWithModel.execute(model, picture).args[0] for model in (wanted_model, ours))
    assert wanted.shape == (1, 48, 80, 3)
    assert_same(got, wanted)
    assert lies_in_its_file(ours.patcher.dynamic)
    # As other packs use it.
    there = picture.movedim(-1, 1).to(ours.patcher.load_device)
    moved = ours.to(there.device).eval()
    assert_same(moved(there), wanted_model.to(there.device)(there))
    assert ours.to("meta") is ours and ours.model.training is False


LOADERS = [
    companions.load_clip_vision,
    companions.load_controlnet,
    companions.load_audio_encoder,
    companions.load_style_model,
    companions.load_upscale_model,
]


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_a_file_of_another_kind_is_an_error_that_names_it(load, checkpoint):
    with pytest.raises(SourceError, match=r"not_a_model.*\.safetensors: .*(found in|could not read) this file"):
        load(checkpoint("not_a_model"))


def test_a_model_patch_of_another_kind_is_an_error_that_names_it(models_dir):
    path = models_dir / "model_patches" / "none.safetensors"
    checkpoints.not_a_model(path)
    with pytest.raises(SourceError, match=r"none\.safetensors: .*found in this file"):
        companions.load_model_patch(path.name)
