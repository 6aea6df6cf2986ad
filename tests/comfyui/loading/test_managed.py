"""Manage every loader: ComfyUI's own functions make Spillway models with ComfyUI's bits, and come back as they were."""

import functools
import inspect

import comfy.clip_vision
import comfy.controlnet
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import nodes as comfyui_nodes
import pytest
import torch
from comfy.audio_encoders.audio_encoders import load_audio_encoder_from_sd
from comfy_extras.nodes_audio_encoder import AudioEncoderLoader
from comfy_extras.nodes_model_patch import ModelPatchLoader
from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel, UpscaleModelLoader

from kit.comfyui import checkpoints, sampling
from kit.comfyui.on_device import comfyuis_dynamic_models
from kit.comfyui.pairs import CLASSIC, assert_same, comfyui_vae, run
from spillway.ops.files.disk_map import map_of
from spillway.ops.gather import inner_tensors
from spillway.patcher.comfyui.loading import managed
from spillway.patcher.comfyui.patcher import DynamicModelPatcher

TEXT = "a small red house by the sea"
# ComfyUI 0.22 moves an upscale model by itself, so there is no patcher to take the place of.
PATCHES_UPSCALERS = "Patcher" in inspect.getsource(UpscaleModelLoader.execute)


@pytest.fixture
def on():
    """``with on(): ...``: every loader builds Spillway models in the block, as in a prompt of its own."""

    class On:
        def __enter__(self):
            managed.turn_on()

        def __exit__(self, *_):
            managed.turn_off()

    yield On
    managed.turn_off()


def lies_in_its_file(patcher):
    """Whether the patcher is Spillway's, and nearly all of its weights lie in a map that the model holds."""
    assert isinstance(patcher, DynamicModelPatcher)
    params = [param for bundle in patcher.dynamic.bundles for param in bundle.params]
    mapped = sum(p.source.nbytes for p in params if all(map_of(part) is not None for part in inner_tensors(p.source)))
    return mapped > 0.9 * sum(param.source.nbytes for param in params)


def standing():
    """What stands in the place of each function that is replaced."""
    places = [(owner, "load_torch_file") for name in managed.FILES for owner in managed.owners(name)]
    places += [(owner, seam.name) for seam in managed.SEAMS for owner in managed.owners(seam.owner)]
    return [inspect.getattr_static(owner, name, None) for owner, name in places]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["flux", "wan", "lumina2", "z_image"])
def test_a_diffusion_model_gives_comfyuis_latents(arch, checkpoint, on):
    path = checkpoint(arch)
    wanted = run(comfy.sd.load_diffusion_model(path, **CLASSIC))
    with comfyuis_dynamic_models(), on():
        model = comfy.sd.load_diffusion_model(path)
    assert lies_in_its_file(model)
    assert_same(run(model), wanted)


def outputs(model, clip, vae):
    cond, pooled = sampling.text_encode(clip, TEXT)
    latents = sampling.sample(model, steps=2, cond=([[cond, {}]], [[cond, {}]]))
    return cond, pooled, latents, sampling.vae_decode(vae, latents / latents.std())


def test_all_parts_of_a_checkpoint_give_comfyuis_outputs(checkpoint, on):
    path = checkpoint("sd15")
    wanted = outputs(*comfy.sd.load_checkpoint_guess_config(path)[:3])
    with on():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(path)
    assert all(lies_in_its_file(one) for one in (model, clip.patcher, vae.patcher))
    assert_same(outputs(model, clip, vae), wanted)


def test_comfyuis_nodes_give_models_of_spillway(checkpoint, models_dir, on):
    """Through the nodes themselves, with names of files: VAE, text encoder, image and audio encoder, ControlNet."""
    made = {
        "vae": ("sd_vae", {}, lambda name: comfyui_nodes.VAELoader().load_vae(name)[0].patcher),
        "text_encoders": ("clip_l", {}, lambda name: comfyui_nodes.CLIPLoader().load_clip(name)[0].patcher),
        "clip_vision": ("siglip", {}, lambda name: comfyui_nodes.CLIPVisionLoader().load_clip(name)[0].patcher),
        "audio_encoders": ("wav2vec", {}, lambda name: AudioEncoderLoader.execute(name).args[0].patcher),
        "controlnet": (
            "sd15_controlnet",
            {},
            lambda name: comfyui_nodes.ControlNetLoader().load_controlnet(name)[0].control_model_wrapped,
        ),
        "upscale_models": ("compact", {}, lambda name: UpscaleModelLoader.execute(name).args[0].patcher),
        "diffusion_models": ("wan", {}, lambda name: comfyui_nodes.UNETLoader().load_unet(name, "default")[0]),
    }
    if not PATCHES_UPSCALERS:
        del made["upscale_models"]
    with on(), checkpoints.encoders_as(checkpoints.SMALL_SIGLIP), checkpoints.two_layers_of_audio():
        for folder, (kind, options, load) in made.items():
            path = models_dir / folder / f"managed-{kind}.safetensors"
            getattr(checkpoints, kind)(path, **options)
            assert lies_in_its_file(load(path.name)), folder


def coded(vae):
    picture = sampling.image()
    latent = sampling.vae_encode(vae, picture)
    return latent, sampling.vae_decode(vae, latent / latent.std())


@pytest.mark.parametrize("kind", ["sd_vae", "flux_vae"])
def test_a_vae_and_its_file_are_the_same_numbers(kind, checkpoint, on):
    path = checkpoint(kind)
    wanted = coded(comfyui_vae(path))
    with on():
        vae = comfyui_vae(path)
    assert lies_in_its_file(vae.patcher)
    assert_same(coded(vae), wanted)


def test_text_image_and_audio_encoders_give_comfyuis_numbers(checkpoint, on):
    sound = torch.randn(1, 1, 8000, generator=torch.Generator().manual_seed(1))
    paths = {kind: checkpoint(kind) for kind in ("clip_l", "t5_base", "siglip", "wav2vec")}

    def encoded():
        for kind, clip_type in (("clip_l", "STABLE_DIFFUSION"), ("t5_base", "STABLE_AUDIO")):
            clip = comfy.sd.load_clip([paths[kind]], clip_type=comfy.sd.CLIPType[clip_type])
            yield clip.patcher, [part for part in sampling.text_encode(clip, TEXT) if part is not None]
        vision = comfy.clip_vision.load(paths["siglip"])
        yield vision.patcher, [vision.encode_image(sampling.image(100, 80))["penultimate_hidden_states"]]
        audio = load_audio_encoder(paths["wav2vec"])
        yield audio.patcher, [audio.encode_audio(sound, 16000)["encoded_audio"]]

    def load_audio_encoder(path):
        import comfy.audio_encoders.audio_encoders as audio

        return audio.load_audio_encoder_from_sd(comfy.utils.load_torch_file(path))

    with checkpoints.encoders_as(checkpoints.SMALL_SIGLIP), checkpoints.two_layers_of_audio():
        with comfyuis_dynamic_models():
            wanted = [numbers for _, numbers in encoded()]
        with on():
            got = list(encoded())
    for (patcher, numbers), other in zip(got, wanted, strict=True):
        assert lies_in_its_file(patcher)
        assert_same(numbers, other)


def test_a_controlnet_and_an_upscale_model_give_comfyuis_pictures(checkpoint, models_dir, on):
    path, unet = checkpoint("sd15_controlnet"), checkpoint("sd15_unet", mult=(1,))
    compact = models_dir / "upscale_models" / "managed.safetensors"
    checkpoints.compact(compact)

    def made():
        controlnet = comfy.controlnet.load_controlnet(path)
        model = comfy.sd.load_diffusion_model(unet)
        conds = comfyui_nodes.ControlNetApplyAdvanced().apply_controlnet(
            *sampling.conds("sd15"), controlnet, sampling.image(256, 256), 0.8, 0.0, 1.0
        )
        upscale = UpscaleModelLoader().load_model(compact.name).args[0]
        larger = ImageUpscaleWithModel.execute(upscale, sampling.image(40, 24)).args[0]
        patchers = [controlnet.control_model_wrapped, *([upscale.patcher] if PATCHES_UPSCALERS else [])]
        return patchers, (run(model, cond=conds), larger.cpu())

    wanted = made()[1]
    with on():
        patchers, got = made()
    assert all(lies_in_its_file(patcher) for patcher in patchers)
    assert_same(got, wanted)


def test_a_model_patch_is_managed(models_dir, on):
    path = models_dir / "model_patches" / "managed-uso.safetensors"
    checkpoints.patch_uso(path, hidden=128)
    with on(), checkpoints.small_patches(uso_hidden=128):
        assert lies_in_its_file(ModelPatchLoader().load_model_patch(path.name)[0])


def test_a_pickle_is_managed_in_memory(flux, tmp_path, on):
    """ComfyUI reads it, so it loads, and its weights stay where ComfyUI has put them."""
    tensors = comfy.utils.load_torch_file(flux)
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "flux.pt")
    wanted = run(comfy.sd.load_diffusion_model(flux, **CLASSIC))
    with on():
        model = comfy.sd.load_diffusion_model(str(tmp_path / "flux.pt"))
    assert isinstance(model, DynamicModelPatcher)
    assert_same(run(model), wanted)


def test_a_state_dict_of_another_pack_is_managed(flux, on):
    """And loses the keys that are used, as ComfyUI has it."""
    wanted = run(comfy.sd.load_diffusion_model(flux, **CLASSIC))
    left = comfy.utils.load_torch_file(flux)
    comfy.sd.load_diffusion_model_state_dict(left, **CLASSIC)
    with on():
        tensors = comfy.utils.load_torch_file(flux)
        model = comfy.sd.load_diffusion_model_state_dict(tensors)
    assert lies_in_its_file(model) and list(tensors) == list(left)
    assert_same(run(model), wanted)
    if CLASSIC:  # a node may ask for a classic one, of which there is no file to load
        managed.turn_on()
        classic = model.clone(disable_dynamic=True)
        assert type(classic) is comfy.model_patcher.ModelPatcher
        assert_same(run(classic), wanted)


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_files_that_are_no_models_are_comfyuis_to_open(checkpoint, models_dir, on):
    lora, flux = models_dir / "loras" / "managed.safetensors", checkpoint("flux")
    checkpoints.lora(lora, flux)
    with on():
        assert all(map_of(tensor) is None for tensor in comfy.utils.load_torch_file(str(lora)).values())
        tensors, metadata = comfy.utils.load_torch_file(flux, return_metadata=True)
        assert all(map_of(tensor) is not None for tensor in tensors.values())
    assert metadata == comfy.utils.load_torch_file(flux, return_metadata=True)[1]


class OpsOfAPack(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        pass


class PatcherOfAPack(comfy.model_patcher.ModelPatcher):
    pass


class VAEOfAPack(comfy.sd.VAE):
    pass


def test_what_other_packs_build_for_themselves_stays_theirs(flux, checkpoint, on):
    with on():
        options = {"custom_operations": OpsOfAPack}
        model = comfy.sd.load_diffusion_model(flux, model_options=options, **CLASSIC)
        assert type(model) is comfy.model_patcher.ModelPatcher
        of_a_pack = comfy.sd.load_diffusion_model(flux, model_options=options)
        assert not isinstance(of_a_pack, DynamicModelPatcher)
        devices = model.load_device, model.offload_device
        patcher = PatcherOfAPack(model.model, *devices)
        assert type(patcher.clone()) is PatcherOfAPack
        vae = VAEOfAPack(sd=comfy.utils.load_torch_file(checkpoint("sd_vae")))
        assert not isinstance(vae.patcher, DynamicModelPatcher)
    assert_same(run(patcher), run(comfy.sd.load_diffusion_model(flux, **CLASSIC)))


def test_a_classic_model_is_a_classic_model(flux, checkpoint, on):
    if not CLASSIC:
        pytest.skip("this ComfyUI has no other")
    with on():
        model = comfy.sd.load_diffusion_model(flux, disable_dynamic=True)
    assert type(model) is comfy.model_patcher.ModelPatcher


@pytest.mark.skipif(not hasattr(comfy.sd, "load_vae_patcher"), reason="this ComfyUI loads no VAE for another device")
def test_a_vae_for_another_device_is_what_was_asked_for(checkpoint, on):
    """As ComfyUI loads one again."""
    with on():
        classic = comfy.sd.load_vae_patcher(checkpoint("sd_vae"), disable_dynamic=True)
        dynamic = comfy.sd.load_vae_patcher(checkpoint("sd_vae"))
    assert not isinstance(classic, DynamicModelPatcher) and isinstance(dynamic, DynamicModelPatcher)


# --- when it fails ----------------------------------------------------------------------------------------------------


def test_an_incomplete_file_is_comfyuis_and_the_log_says_so(checkpoint, on, caplog):
    """ComfyUI runs a model of which weights are missing. Spillway would refuse to."""
    path = checkpoint("missing_key", key="double_blocks.0.img_mlp.0.weight", hidden=128, depth=1, depth_single=1)
    with on():
        model = comfy.sd.load_diffusion_model(path)
    assert not isinstance(model, DynamicModelPatcher)
    assert "this diffusion model is left to ComfyUI" in caplog.text and "not in the file" in caplog.text


def test_a_vae_that_fails_inside_is_built_anew(checkpoint, on, caplog, monkeypatch):
    """Nothing of the first attempt stays in the object."""
    path = checkpoint("sd_vae")
    wanted = comfyui_vae(path)

    def fail(made):
        made.of_the_first_attempt = True
        for patcher in managed._patchers(made):
            raise RuntimeError(f"{type(patcher).__name__} does not please")

    monkeypatch.setattr(managed, "_checked", fail)
    with on():
        vae = comfyui_vae(path)
    assert "this VAE is left to ComfyUI (RuntimeError: DynamicModelPatcher does not please)" in caplog.text
    assert type(vae.patcher) is type(wanted.patcher) and set(vars(vae)) == set(vars(wanted))
    assert_same(coded(vae), coded(wanted))


def test_a_late_failure_leaves_all_tensors_to_comfyui(flux, on, monkeypatch):
    """ComfyUI takes out of a dict what it uses."""
    monkeypatch.setattr(managed, "_checked", lambda made: 1 // 0)
    with on():
        tensors = comfy.utils.load_torch_file(flux)
        model = comfy.sd.load_diffusion_model_state_dict(tensors, **CLASSIC)
        other = comfy.sd.load_diffusion_model_state_dict(comfy.utils.load_torch_file(flux))
    assert not isinstance(other, DynamicModelPatcher)
    assert_same(run(other), run(model))


def test_tensors_that_were_written_into_are_read_anew(checkpoint, on, monkeypatch):
    """ComfyUI adds a model to a ControlNet of differences in place. A second time would be once too often."""
    tensors = comfy.utils.load_torch_file(checkpoint("sd15_controlnet"))
    changed = []

    def build(self, call, given):
        for tensor in given.arguments["state_dict"].values():
            tensor += 1
            changed.append(tensor)
        raise RuntimeError("too late")

    monkeypatch.setattr(managed._Building, "_build", build)
    with on():
        ours = comfy.utils.load_torch_file(checkpoint("sd15_controlnet"))
        assert comfy.controlnet.load_controlnet_state_dict(dict(ours)) is not None
        given = {key: tensor for key, tensor in ours.items() if tensor._version == 0}
        assert changed and not given
        again = comfy.utils.load_torch_file(checkpoint("sd15_controlnet"))
        seen = {}
        monkeypatch.setattr(
            managed,
            "_take_writes_back",
            lambda given, before, take=managed._take_writes_back: (take(given, before), seen.update(given))[0],
        )
        comfy.controlnet.load_controlnet_state_dict(again)
    assert seen and all(torch.equal(seen[key], tensors[key]) for key in seen)


def test_a_file_of_another_kind_has_comfyuis_error(checkpoint, on):
    path = checkpoint("not_a_model")
    with pytest.raises(RuntimeError, match="Could not detect model type") as wanted:
        comfy.sd.load_diffusion_model(path)
    with on(), pytest.raises(RuntimeError) as got:
        comfy.sd.load_diffusion_model(path)
    assert str(got.value) == str(wanted.value)


# --- on and off -------------------------------------------------------------------------------------------------------


def test_off_puts_the_very_same_functions_back(on):
    before = standing()
    for _ in range(2):
        with on():
            changed = standing()
            there = [(old, new) for old, new in zip(before, changed, strict=True) if old is not None]
            assert all(old is not new for old, new in there)
            managed.turn_on()  # twice is once
        assert all(now is old for now, old in zip(standing(), before, strict=True))
    assert not managed.is_on()


def test_a_pack_that_wrapped_a_function_meanwhile_keeps_its_wrapper(flux, on, monkeypatch):
    before, calls = comfy.sd.load_diffusion_model_state_dict, []
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", before)  # as it was, after the test
    managed.turn_on()
    ours = comfy.sd.load_diffusion_model_state_dict

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        calls.append(args)
        return ours(*args, **kwargs)

    comfy.sd.load_diffusion_model_state_dict = theirs
    assert isinstance(comfy.sd.load_diffusion_model(flux), DynamicModelPatcher)
    managed.turn_off()
    assert comfy.sd.load_diffusion_model_state_dict is theirs
    assert not isinstance(comfy.sd.load_diffusion_model(flux), DynamicModelPatcher)
    managed.turn_on()
    assert isinstance(comfy.sd.load_diffusion_model(flux), DynamicModelPatcher)
    managed.turn_off()
    assert comfy.sd.load_diffusion_model_state_dict is theirs and len(calls) == 3


def test_packs_see_what_a_function_takes(on):
    """They look before they give ComfyUI's newer arguments."""
    wanted = inspect.signature(comfy.sd.load_diffusion_model_state_dict)
    with on():
        assert inspect.signature(comfy.sd.load_diffusion_model_state_dict) == wanted
        assert comfy.sd.load_diffusion_model_state_dict.__name__ == "load_diffusion_model_state_dict"


def test_a_function_that_hides_what_it_takes_is_left_alone(flux, on, caplog, monkeypatch):
    original = comfy.sd.load_diffusion_model_state_dict
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *args, **kwargs: original(*args, **kwargs))
    with on():
        assert not isinstance(comfy.sd.load_diffusion_model(flux), DynamicModelPatcher)
    assert "does not say what it takes" in caplog.text


def test_the_folders_are_those_of_comfyui():
    known = folder_paths.folder_names_and_paths
    assert [name for name in managed.FOLDERS if name not in known] in ([], ["model_patches"], ["audio_encoders"])
    assert load_audio_encoder_from_sd is not None
