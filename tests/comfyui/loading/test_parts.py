"""Models in several files and diffusers folders through the loaders: the bits of one file, and nothing is read."""

import inspect
import json
import os
import shutil

import comfy.model_detection
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy import diffusers_convert as names
from safetensors.torch import load_file

from kit.comfyui import checkpoints
from kit.comfyui.pairs import SMALL, assert_same, budget, comfyui_vae, run
from kit.comfyui.saving import read, save
from kit.nets import same
from kit.shards import write_shards
from spillway.cache.comfyui import stamps
from spillway.nodes.load import (
    SpillwayLoadCheckpoint,
    SpillwayLoadCLIP,
    SpillwayLoadDiffusionModel,
    SpillwayLoadVAE,
    file_stamps,
    model_names,
    pipeline_names,
)
from spillway.ops.files.disk_map import SourceError, locate
from spillway.ops.gather import memory_of
from spillway.ops.lending.idle_weight import as_stored
from spillway.patcher.comfyui.loading.load import load_clip, load_diffusion_model, load_vae


def lazy(model):
    """Whether every weight of a model lies in its files."""
    weights = [weight.detach() for weight in model.parameters() if weight.numel() > 1]  # not CLIP's scale
    return bool(weights) and all(locate(piece) is not None for one in weights for piece in memory_of(as_stored(one)))


@pytest.fixture
def placed(models_dir):
    """``placed("vae", "x")``: a path in one of ComfyUI's folders, which is removed afterwards."""
    made = []

    def place(kind, name):
        path = models_dir / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(path)
        return path

    yield place
    for path in made:
        shutil.rmtree(path, ignore_errors=True)


def encode(clip):
    return clip.encode_from_tokens(clip.tokenize("a photo of a lake"))


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_a_sharded_model_is_the_whole_one(fraction, checkpoint, tmp_path):
    whole = checkpoint("flux", **SMALL)
    index = write_shards(tmp_path, load_file(whole))
    classic = comfy.sd.load_diffusion_model(whole)
    ours = load_diffusion_model(str(index), policy=budget(classic, fraction))
    assert lazy(ours.model) and len(ours.model.spillway_maps) == 3
    wanted = run(classic)
    for _ in range(2):
        assert_same(run(ours), wanted)
        ours.dynamic.release()
    if "disable_dynamic" in inspect.signature(comfy.sd.load_diffusion_model).parameters:  # not in older versions
        assert_same(run(load_diffusion_model(str(index), disable_dynamic=True)), wanted)
        assert_same(run(ours.clone(disable_dynamic=True)), wanted)
    saved, reference = read(save(ours))[0], read(save(load_diffusion_model(whole)))[0]
    assert set(saved) == set(reference) and all(same(saved[key], reference[key]) for key in saved)


def test_sharded_text_encoders_and_vaes_are_the_whole_ones(checkpoint, tmp_path):
    clip_l, vae = checkpoint("clip_l"), checkpoint("sd_vae")
    clip = load_clip([str(write_shards(tmp_path / "clip", load_file(clip_l)))])
    assert lazy(clip.cond_stage_model)
    assert_same(encode(clip), encode(comfy.sd.load_clip([clip_l])))
    ours = load_vae(str(write_shards(tmp_path / "vae", load_file(vae))))
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert_same(ours.decode(latent), comfyui_vae(vae).decode(latent))


def test_a_part_is_refused_by_every_loader_with_what_to_choose(checkpoint, placed):
    """Half of a text encoder would load, and fail when it is used."""
    index = write_shards(placed("text_encoders", "whole"), load_file(checkpoint("clip_l")), count=2)
    name = "whole/model-00001-of-00002.safetensors"
    with pytest.raises(SourceError, match=r"this is part 1 of 2 of 'model'.*Choose 'model\.safetensors\.index\.json'"):
        SpillwayLoadCLIP.execute(clip_name1=name, type="stable_diffusion")
    assert f"whole/{index.name}" in model_names("text_encoders") and name not in model_names("text_encoders")
    clip = SpillwayLoadCLIP.execute(clip_name1=f"whole/{index.name}", type="stable_diffusion").args[0]
    assert lazy(clip.cond_stage_model)


def test_another_part_under_the_same_name_makes_a_loader_run_again(checkpoint, placed):
    folder = placed("diffusion_models", "parts")
    index = write_shards(folder, load_file(checkpoint("flux", **SMALL)))
    name = f"parts/{index.name}"
    before, kept = file_stamps("diffusion_models", name), stamps.stamps_of({"inputs": {"unet_name": name}})
    assert len(before) == 4 and stamps.still_hold(stamps.as_record(kept))
    part = folder / "model-00002-of-00003.safetensors"
    data = part.read_bytes()
    part.unlink()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert file_stamps("diffusion_models", name) != before
    assert not stamps.still_hold(stamps.as_record(kept))


def pipeline(folder, name, **models):
    """A folder as diffusers writes it. models: folder -> tensors, or a list of (tensors, number of parts)."""
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    for part, tensors in models.items():
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        write_shards(folder / part, tensors, count=2, stem=stem)
    return folder


def vae_as_diffusers(path):
    """The tensors of an SD VAE under the names of diffusers."""
    tensors = {}
    for key, value in load_file(path).items():
        new = key
        for ours, theirs in names.vae_conversion_map:
            new = new.replace(ours, theirs)
        if ".attentions." in new:
            pairs = (("norm.", "group_norm."), ("proj_out.", "to_out.0."), *((f"{x}.", f"to_{x}.") for x in "qkv"))
            for ours, theirs in pairs:
                new = new.replace(f".attentions.0.{ours}", f".attentions.0.{theirs}")
            value = value.reshape(value.shape[:2]) if value.dim() == 4 else value
        tensors[new] = value
    return tensors


def unet_as_diffusers(path):
    tensors = load_file(path)
    config = comfy.model_detection.model_config_from_unet(dict(tensors), "").unet_config
    return {theirs: tensors[ours] for theirs, ours in comfy.utils.unet_to_diffusers(config).items() if ours in tensors}


def test_a_pipelines_folder_is_the_single_files(checkpoint, placed, monkeypatch):
    """Stable Diffusion 1.5: a UNet, a text encoder and a VAE, each in parts and with the names of diffusers."""
    plain = load_file(checkpoint("sd15_unet", mult=(1, 2)))
    # ComfyUI knows UNets of diffusers by the sizes of the published ones alone.
    find = comfy.model_detection.model_config_from_unet
    monkeypatch.setattr(comfy.model_detection, "model_config_from_diffusers_unet", lambda _: find(plain, ""))
    unet, clip_l, vae = checkpoint("sd15_unet", mult=(1, 2)), checkpoint("clip_l"), checkpoint("sd_vae")
    folder = pipeline(
        placed("diffusers", "sd15"),
        "StableDiffusionPipeline",
        unet=unet_as_diffusers(unet),
        text_encoder=load_file(clip_l),
        vae=vae_as_diffusers(vae),
    )
    assert all("sd15" in pipeline_names(kind) for kind in ("checkpoints", "diffusion_models", "text_encoders", "vae"))
    model, clip, ours_vae, vision = SpillwayLoadCheckpoint.execute(ckpt_name="sd15").args
    assert vision is None and lazy(model.model) and lazy(clip.cond_stage_model) and lazy(ours_vae.first_stage_model)
    wanted = run(comfy.sd.load_diffusion_model(unet))
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    decoded, encoded = comfyui_vae(vae).decode(latent), encode(comfy.sd.load_clip([clip_l]))
    assert_same(run(model), wanted)
    assert_same(encode(clip), encoded)
    assert_same(ours_vae.decode(latent), decoded)
    one = SpillwayLoadDiffusionModel.execute(unet_name="sd15", weight_dtype="default").args[0]
    assert_same(run(one), wanted)
    assert_same(encode(SpillwayLoadCLIP.execute(clip_name1="sd15", type="stable_diffusion").args[0]), encoded)
    assert_same(SpillwayLoadVAE.execute(vae_name="sd15/vae").args[0].decode(latent), decoded)
    assert len(file_stamps("vae", "sd15")) == 1 + 3 * 3
    (folder / "model_index.json").write_text('{"_class_name": "UnheardOfPipeline"}')
    model, clip, *_ = SpillwayLoadCheckpoint.execute(ckpt_name="sd15").args
    assert clip is None and model is not None
    (folder / "model_index.json").write_text("{")
    with pytest.raises(SourceError, match=r"model_index\.json: not JSON"):
        SpillwayLoadCheckpoint.execute(ckpt_name="sd15")


def test_a_flux_folder_in_parts_is_the_single_file(checkpoint, placed):
    """Queries, keys and values of one weight may lie in different files."""
    plain = checkpoint("flux", **SMALL)
    pipeline(
        placed("diffusers", "flux"), "FluxPipeline", transformer=load_file(checkpoint("flux_as_diffusers", **SMALL))
    )
    model, clip, vae, _ = SpillwayLoadCheckpoint.execute(ckpt_name="flux").args
    assert clip is None and vae is None and lazy(model.model)
    classic = comfy.sd.load_diffusion_model(plain)
    assert_same(run(model), run(classic))
    ours = load_diffusion_model(os.path.dirname(model.model.spillway_path), policy=budget(classic, 0.2))
    assert_same(run(ours), run(classic))


def test_a_pipeline_with_two_text_encoders_is_the_single_files(checkpoint, placed, monkeypatch):
    """Flux: transformer, text_encoder, text_encoder_2 and vae, each in parts, by one input of one loader."""
    load, narrow = comfy.sd.load_clip, checkpoints.T5XXL_SMALL_OPTIONS
    monkeypatch.setattr(comfy.sd, "load_clip", lambda **named: load(**named, model_options=dict(narrow)))
    options = {**SMALL, "context": checkpoints.T5XXL_SMALL["d_model"], "pooled": 768}
    clip_l, t5, ae = checkpoint("clip_l"), checkpoint("t5xxl_small"), checkpoint("flux_vae")
    folder = pipeline(
        placed("diffusers", "whole"),
        "FluxPipeline",
        transformer=load_file(checkpoint("flux_as_diffusers", **options)),
        text_encoder=load_file(clip_l),
        text_encoder_2=load_file(t5),
        vae=vae_as_diffusers(ae),
    )
    model, clip, vae, _ = SpillwayLoadCheckpoint.execute(ckpt_name="whole").args
    assert lazy(model.model) and lazy(clip.cond_stage_model) and lazy(vae.first_stage_model)
    theirs = comfy.sd.load_clip(ckpt_paths=[clip_l, t5], clip_type=comfy.sd.CLIPType.FLUX)
    assert clip.cond_stage_model.t5xxl is not None and type(clip.tokenizer) is type(theirs.tokenizer)
    both = [one.encode_from_tokens(one.tokenize("a photo of a lake"), return_pooled=True) for one in (clip, theirs)]
    assert_same(*both)
    assert_same(run(model), run(comfy.sd.load_diffusion_model(checkpoint("flux", **options))))
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    assert_same(vae.decode(latent), comfyui_vae(ae).decode(latent))
    # What is missing of a pipeline is not there, and the rest is.
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder_2")
    (folder / "text_encoder_2").mkdir()
    with pytest.raises(SourceError, match=r"text_encoder_2: no safetensors file here"):
        SpillwayLoadCheckpoint.execute(ckpt_name="whole")
    (folder / "text_encoder_2").rmdir()
    shutil.rmtree(folder / "text_encoder")
    model, clip, vae, _ = SpillwayLoadCheckpoint.execute(ckpt_name="whole").args
    assert clip is None and vae is None and model is not None
    shutil.rmtree(folder / "transformer")
    with pytest.raises(SourceError, match="whole: "):
        SpillwayLoadDiffusionModel.execute(unet_name="whole", weight_dtype="default")
    with pytest.raises(SourceError, match="whole: this pipeline's folder has none of transformer, unet, text_enc"):
        SpillwayLoadCheckpoint.execute(ckpt_name="whole")


def test_no_folder_outside_of_comfyuis_is_opened(placed, tmp_path):
    checkpoints.write(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
    for name in ("..", "../..", str(tmp_path), "", "."):
        with pytest.raises((FileNotFoundError, SourceError)) as error:
            SpillwayLoadVAE.execute(vae_name=name)
        assert "There is no file" in str(error.value)
