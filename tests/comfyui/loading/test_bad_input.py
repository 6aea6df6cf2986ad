"""Files and settings that are wrong: the loader nodes say what, where and what to do, and leave ComfyUI as it was."""

import os

import comfy.memory_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints, sampling
from kit.comfyui.pairs import SMALL, assert_same, comfyui_vae, run
from spillway.nodes.load import SpillwayLoadCheckpoint, SpillwayLoadCLIP, SpillwayLoadDiffusionModel, SpillwayLoadVAE
from spillway.nodes.policy import SpillwayPolicy
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

PATCHED = (
    (comfy.model_patcher, "CoreModelPatcher"),
    (comfy.utils, "load_torch_file"),
    (torch.nn.Parameter, "__new__"),
    (torch.nn.Module, "load_state_dict"),
)


@pytest.fixture(scope="module")
def good(checkpoint):
    path = checkpoint("flux", **SMALL)
    return path, run(comfy.sd.load_diffusion_model(path), steps=1)


@pytest.fixture(autouse=True)
def nothing_remains(good):
    """After an error the next load is none the worse."""
    before = [getattr(owner, name) for owner, name in PATCHED]
    yield
    assert [getattr(owner, name) for owner, name in PATCHED] == before
    path, wanted = good
    assert_same(run(comfy_load.load_diffusion_model(path, policy=Policy(vram_bytes=1 << 20)), steps=1), wanted)


@pytest.fixture
def folder(models_dir):
    """A function that gives the path of a file of a kind and its name; the file is gone after the test."""
    made = []

    def place(kind, name):
        made.append(models_dir / kind / name)
        return made[-1]

    yield place
    for path in made:
        if path.is_dir():
            path.rmdir()
        elif path.exists():
            path.unlink()


def load_model(path, **options):
    return SpillwayLoadDiffusionModel.execute(unet_name=path.name, weight_dtype="default", **options)


def load_checkpoint(path):
    return SpillwayLoadCheckpoint.execute(ckpt_name=path.name)


def load_clip(path, type="stable_diffusion"):
    return SpillwayLoadCLIP.execute(clip_name1=path.name, type=type)


def load_vae(path):
    return SpillwayLoadVAE.execute(vae_name=path.name)


LOADERS = {
    "diffusion_models": load_model,
    "checkpoints": load_checkpoint,
    "text_encoders": load_clip,
    "vae": load_vae,
}

WRONG = {
    "truncated": (checkpoints.truncated, {}, r"truncated: tensor '.+' ends at byte \d+, the file has \d+.*again"),
    "no header": (checkpoints.wrong_header, {"kind": "short"}, r"the file has 5 bytes.*again"),
    "long header": (checkpoints.wrong_header, {"kind": "length"}, r"truncated inside its header.*again"),
    "huge header": (checkpoints.wrong_header, {"kind": "huge"}, r".*not a safetensors file.*convert"),
    "no JSON": (checkpoints.wrong_header, {"kind": "json"}, r"the header is not JSON.*again"),
    "a list": (checkpoints.wrong_header, {"kind": "not_a_dict"}, r"the header is a list.*again"),
    "beyond the data": (checkpoints.wrong_header, {"kind": "offsets"}, r"truncated: tensor '.+'.*again"),
    "overlapping": (checkpoints.wrong_header, {"kind": "overlap"}, r"tensor '.+' overlaps '.+'.*again"),
    "wrong size": (checkpoints.wrong_header, {"kind": "size"}, r"tensor '.+' of .* needs \d+ bytes.*again"),
    "negative": (checkpoints.wrong_header, {"kind": "negative"}, r"tensor '.+': expected .* found .*again"),
    "dtype": (checkpoints.wrong_header, {"kind": "dtype"}, r"tensor '.+' has dtype F12.*Convert"),
    "empty": (checkpoints.not_a_model, {"kind": "empty"}, r"the file has 0 bytes.*again"),
    "text": (checkpoints.not_a_model, {"kind": "text"}, r".*not a safetensors file"),
    "web page": (checkpoints.not_a_model, {"kind": "html"}, r".*not a safetensors file"),
    "no model": (checkpoints.not_a_model, {"kind": "tensors"}, r"no (model|VAE|text encoder) that ComfyUI knows"),
    "no tensors": (checkpoints.not_a_model, {"kind": "none"}, r"no (model|VAE|text encoder) that ComfyUI knows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_loader_refuses_a_wrong_file_with_its_name_and_the_reason(case, folder):
    build, options, words = WRONG[case]
    options = options if build is checkpoints.not_a_model else {**options, **SMALL}
    for kind, load in LOADERS.items():
        path = folder(kind, "wrong.safetensors")
        build(path, **options)
        with pytest.raises(ValueError, match=rf"wrong\.safetensors: {words}"):
            load(path)


def test_a_pickle_is_refused_with_the_way_to_convert_it(folder):
    for kind, load in LOADERS.items():
        for suffix in (".ckpt", ".pt", ".bin"):
            path = folder(kind, f"old{suffix}")
            torch.save({"weight": torch.zeros(4)}, path)
            with pytest.raises(ValueError, match=rf"old\{suffix}: .* files are pickles.*Convert it"):
                load(path)


def test_a_missing_file_is_an_error_that_says_where_to_put_it(folder):
    for kind, load in LOADERS.items():
        path = folder(kind, "gone.safetensors")
        with pytest.raises(FileNotFoundError, match=r"no file 'gone\.safetensors' in .*Put it there"):
            load(path)
        path.mkdir()  # a folder of that name is no file either
        with pytest.raises(FileNotFoundError, match=r"no file 'gone\.safetensors' in"):
            load(path)
    with pytest.raises(ValueError, match=r"gone\.safetensors: is a folder; name the safetensors file in it"):
        comfy_load.load_diffusion_model(str(path))


@pytest.mark.parametrize("key", ["double_blocks.0.img_mlp.2.weight", "single_blocks.0.linear1.bias", "img_in.weight"])
def test_a_missing_weight_of_the_model_is_an_error_that_names_it(key, folder):
    if key == "img_in.weight":  # which ComfyUI recognises the model by
        words = r"gap\.safetensors: (no model that ComfyUI knows|.*'img_in.weight')"
    else:
        words = (
            rf"gap\.safetensors: 1 tensors that Flux needs are missing, such as {key}.*incomplete.*get a complete one"
        )
    for kind in ("diffusion_models", "checkpoints"):
        path = folder(kind, "gap.safetensors")
        checkpoints.missing_key(path, key, **SMALL)
        with pytest.raises(ValueError, match=words):
            LOADERS[kind](path)


def test_a_part_may_lack_a_weight_until_that_is_used(checkpoint, folder):
    """Other parts may be incomplete, as a VAE without its encoder: only what is not there cannot be used."""
    path = folder("vae", "decoder.safetensors")
    checkpoints.flux_vae(path, drop=("encoder.conv_in.weight",))
    (vae,) = load_vae(path).args
    image, latent = sampling.image(32, 32), sampling.latent(16, 32, 32)
    assert_same(sampling.vae_decode(vae, latent), sampling.vae_decode(comfyui_vae(checkpoint("flux_vae")), latent))
    with pytest.raises(ValueError, match=r"'encoder\.conv_in\.weight' .* is needed by Conv2d.*incomplete"):
        sampling.vae_encode(vae, image)


@pytest.mark.parametrize("dynamic_vram", [False, True])
def test_a_weight_of_another_shape_is_an_error_that_names_it(dynamic_vram, good, folder, monkeypatch):
    """With dynamic VRAM on, ComfyUI's layers take a weight of any shape."""
    path = folder("diffusion_models", "shape.safetensors")
    entries = comfy.utils.load_torch_file(good[0])
    entries["double_blocks.0.img_mlp.2.weight"] = torch.zeros(128, 500)
    checkpoints.write(path, entries)
    if dynamic_vram:
        monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True, raising=False)
    with pytest.raises(ValueError, match=r"(?s)shape\.safetensors: .*double_blocks\.0\.img_mlp\.2\.weight.*another"):
        load_model(path)


def test_an_unknown_quantisation_is_an_error_that_names_file_and_format(good, folder):
    path = folder("diffusion_models", "someday.safetensors")
    entries = comfy.utils.load_torch_file(good[0])
    words = torch.tensor(list(b'{"format": "int3_someday"}'), dtype=torch.uint8)
    entries["double_blocks.0.img_mlp.2.comfy_quant"] = words
    checkpoints.write(path, entries)
    with pytest.raises(ValueError, match=r"someday\.safetensors: .*int3_someday"):
        load_model(path)


def test_an_unknown_type_of_text_encoder_is_an_error_that_lists_the_known_ones(checkpoint, folder):
    path = folder("text_encoders", "clip.safetensors")
    os.symlink(checkpoint("clip_l"), path)
    with pytest.raises(ValueError, match=r"type 'stable_diffusion_9' is unknown.*Known: stable_diffusion, "):
        comfy_load.load_clip([path], "stable_diffusion_9")
    with pytest.raises(ValueError, match=r"'type' is 'stable_diffusion_9'.*expected one of stable_diffusion, "):
        load_clip(path, "stable_diffusion_9")


def test_a_file_of_another_kind_is_refused_by_name(checkpoint, folder):
    """A VAE given as a diffusion model, and a diffusion model as anything else."""
    path = folder("diffusion_models", "vae.safetensors")
    os.symlink(checkpoint("sd_vae"), path)
    with pytest.raises(ValueError, match=r"vae\.safetensors: no model that ComfyUI knows"):
        load_model(path)
    for kind in ("vae", "text_encoders"):
        path = folder(kind, "flux.safetensors")
        os.symlink(checkpoint("flux", **SMALL), path)
        with pytest.raises(ValueError, match=r"flux\.safetensors: no (VAE|text encoder) that ComfyUI knows"):
            LOADERS[kind](path)


@pytest.mark.parametrize("name", ["vram_gb", "headroom_gb", "pinned_gb"])
def test_a_negative_size_is_refused_with_the_name_of_its_input(name):
    sizes = {"vram_gb": -1.0, "headroom_gb": -1.0, "pinned_gb": -1.0, name: -0.5}
    with pytest.raises(ValueError, match=rf"{name} is -0\.5; give 0 or more GB, or -1"):
        SpillwayPolicy.execute(**sizes, keep="auto", priority=0)


def test_a_budget_smaller_than_any_bundle_gives_the_right_picture(good, folder):
    """Not an error: nothing stays, the picture is right, and the ledger says why."""
    path = folder("diffusion_models", "small.safetensors")
    os.symlink(good[0], path)
    (model,) = load_model(path, policy=Policy(vram_bytes=1000)).args
    assert_same(run(model, steps=1), good[1])
    assert model.dynamic.peak_resident_bytes <= 1000
    assert any("smaller than" in words for words in model.dynamic.ledger.decisions)
