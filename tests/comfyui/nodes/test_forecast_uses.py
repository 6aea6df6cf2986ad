"""The forecast of what stands beside the samplers: text encoders, and the decoding and encoding of pictures."""

import folder_paths
import pytest
import torch

from kit.comfyui.checkpoints.text_encoders import T5XXL_SMALL, _t5
from kit.comfyui.checkpoints.vaes import sd_vae_entries
from kit.comfyui.forecast_graphs import graph, node, pages_in_ram, put_companions, put_files, register, write_hole
from kit.comfyui.on_device import weights_at_once
from spillway.nodes.forecast_report import forecast
from spillway.nodes.forecast_use_report import told_of_uses
from spillway.nodes.forecast_words import in_lines
from spillway.patcher.comfyui.forecast import learnt
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_clip, load_vae
from spillway.patcher.dynamic_model import models

MIB = 1 << 20
FLUX, CLIP, SD15 = (f"forecast-{name}.safetensors" for name in ("flux", "clip", "sd15"))
VAES = {"flux_vae": (16, 1), "wan_vae": (16, 5)}  # channels, frames


@pytest.fixture(scope="module", autouse=True)
def files(models_dir, checkpoint):
    put_files(models_dir, checkpoint)
    put_companions(models_dir, checkpoint)


@pytest.fixture(autouse=True)
def classes(monkeypatch):
    register(monkeypatch)


def whole(vae="flux_vae", side=64, batch=1, arch="flux", kind="VAEDecode", **tiles):
    """A graph with a text encoder for both prompts, and a VAE that decodes."""
    found = graph(FLUX if arch == "flux" else "forecast-wan.safetensors", arch=arch)
    found["latent1"]["inputs"].update(width=side, height=side, batch_size=batch)
    found["clip"] = node("SpillwayLoadCLIP", clip_name1=CLIP, type="stable_diffusion")
    found["yes"] = node("CLIPTextEncode", clip=["clip", 0], text="a house")
    found["no"] = node("CLIPTextEncode", clip=["clip", 0], text="a garden")
    found["vae"] = node("SpillwayLoadVAE", vae_name=f"forecast-{vae}.safetensors")
    found["decode"] = node(kind, vae=["vae", 0], samples=["sampler1", 0], **tiles)
    return found


def uses(prompt):
    """What is told without the samplers, which have tests of their own."""
    return {one["id"]: one for one in told_of_uses(prompt, None, None)[0]}


def decoding(**more):
    """The graph without its text encoder, where only the VAE matters."""
    found = whole(**more)
    return {name: node for name, node in found.items() if name not in ("clip", "yes", "no")}


def decoded(prompt):
    return uses(prompt)["decode"]["forecast"]


def bytes_of(patcher):
    return patcher.dynamic.total_bytes + patcher.dynamic.placed_bytes


def path_of(folder, name):
    return folder_paths.get_full_path(folder, name)


def test_each_text_encoder_is_told_of_once_and_each_use_of_a_vae():
    prompt = whole()
    prompt["again"] = node("VAEDecode", vae=["vae", 0], samples=["sampler1", 0])
    prompt["encode"] = node("VAEEncode", vae=["vae", 0], pixels=["decode", 0])
    told = uses(prompt)
    assert {name: one["what"] for name, one in told.items()} == {
        **{"yes": "text", "decode": "decode", "again": "decode", "encode": "encode"}
    }
    assert told["yes"]["loader"] == {"id": "clip", "kind": "SpillwayLoadCLIP"}
    clip = load_clip([path_of("text_encoders", CLIP)])
    assert told["yes"]["forecast"]["total"] + told["yes"]["forecast"]["placed"] == bytes_of(clip.patcher)
    vae = load_vae(path_of("vae", "forecast-flux_vae.safetensors"))
    assert told["decode"]["forecast"]["total"] == bytes_of(vae.patcher)
    assert [note["code"] for note in told["yes"]["notes"]] == ["text"] and told["decode"]["notes"] == []
    words = in_lines(forecast(prompt))
    assert "VAEDecode (decode): AutoencodingEngine" in words and "CLIPTextEncode (yes): SD1ClipModel" in words


@pytest.mark.parametrize("name", VAES)
@pytest.mark.parametrize("tile", [None, 128])
def test_what_a_vae_computes_is_comfyuis_own_estimate(name, tile, monkeypatch):
    """Until a run has shown it."""
    monkeypatch.setattr(learnt, "peaks_of", lambda *_: learnt.Peaks())
    channels, frames = VAES[name]
    arch = "wan" if frames > 1 else "flux"
    tiles = {} if tile is None else {"tile_size": tile, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    prompt = decoding(vae=name, side=256, arch=arch, kind="VAEDecode" if tile is None else "VAEDecodeTiled", **tiles)
    prompt["encode"] = node("VAEEncode", vae=["vae", 0], pixels=["decode", 0])
    told = uses(prompt)
    vae = load_vae(path_of("vae", f"forecast-{name}.safetensors"))
    edge = 32 if tile is None else tile // 8
    along = ((frames - 1) // 4 + 1,) if frames > 1 else ()
    estimate = int(vae.memory_used_decode((1, channels, *along, edge, edge), vae.vae_dtype))
    assert told["decode"]["forecast"]["computation"] == estimate > 0
    assert told["decode"]["forecast"]["tiled"] == (tile is not None)
    pixels = (1, 3, frames, 256, 256) if frames > 1 else (1, 3, 256, 256)
    assert told["encode"]["forecast"]["computation"] == int(vae.memory_used_encode(pixels, vae.vae_dtype))


def test_pictures_are_decoded_at_once_as_far_as_there_is_room():
    one, two, many = (decoded(decoding(side=512, batch=batch))["computation"] for batch in (1, 2, 512))
    assert two == 2 * one < many < 512 * one


def test_what_does_not_fit_is_cut_into_tiles():
    prompt = decoding(side=8192)
    now = uses(prompt)["decode"]
    (way,), now = now["ways"], now["forecast"]
    assert not now["fits"] and way["forecast"]["fits"] and way["forecast"]["peak"] < now["peak"]
    assert (way["code"], way["id"], way["swap"]) == ("tiled", "decode", "VAEDecodeTiled")
    prompt["decode"] = node(way["swap"], **{**prompt["decode"]["inputs"], **way["values"]})
    told = uses(prompt)["decode"]
    assert told["forecast"] == way["forecast"] and told["ways"] == []
    now = {"samplers": [], "uses": [uses(decoding(side=8192))["decode"]], "left_out": 0}
    assert "VAEDecodeTiled with tile_size 512" in in_lines(now)
    large = {"tile_size": 4096, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    (way,) = uses(decoding(side=8192, kind="VAEDecodeTiled", **large))["decode"]["ways"]
    assert (way["code"], way["widget"], way["value"]) == ("tiles", "tile_size", 512)
    ours = uses(decoding(side=8192, kind="SpillwayVAEDecode", tile_size=512))["decode"]
    assert ours["ways"] == [] and ours["forecast"]["tiled"] and ours["forecast"]["fits"], "it does so by itself"


def test_parts_of_a_checkpoint_are_told_of():
    prompt = whole()
    prompt["all"] = node("SpillwayLoadCheckpoint", ckpt_name=SD15, clip_dtype="default")
    prompt["last"] = node("CLIPSetLastLayer", clip=["all", 1], stop_at_clip_layer=-2)
    prompt["yes"]["inputs"]["clip"] = ["last", 0]
    prompt["decode"]["inputs"]["vae"] = ["all", 2]
    prompt["no"]["inputs"]["clip"] = ["all", 1]
    told = uses(prompt)
    _, clip, vae, _ = load_checkpoint(path_of("checkpoints", SD15))
    assert told["yes"]["forecast"]["total"] == told["no"]["forecast"]["total"] == clip.patcher.dynamic.total_bytes
    assert told["decode"]["forecast"]["total"] == vae.patcher.dynamic.total_bytes


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda prompt: prompt["vae"].update(class_type="LoaderOfAnotherPack"), "unknown"),
        (lambda prompt: prompt["vae"].update(class_type="VAELoader"), "theirs"),
        (lambda prompt: prompt["vae"]["inputs"].update(vae_name="no-such-file.safetensors"), "error"),
        (lambda prompt: prompt["vae"]["inputs"].update(vae_name=["somewhere", 0]), "wired"),
        (lambda prompt: prompt["decode"]["inputs"].update(vae=["gone", 0]), "missing"),
        (lambda prompt: prompt["latent1"]["inputs"].update(width=["somewhere", 0]), "size"),
        (lambda prompt: prompt["decode"].update(class_type="NoSuchClass"), None),
    ],
)
def test_what_cannot_be_known_is_said(change, code):
    prompt = decoding()
    change(prompt)
    told = uses(prompt).get("decode")
    if code is None:
        assert told is None, "no class of that name decodes"
        return
    assert [note["code"] for note in told["notes"]] == [code]
    assert (told["forecast"] is None) == (code not in ("theirs", "size"))
    assert told["ways"] == [] or not told["forecast"]["fits"], "a card in fp32 has no room for this picture"
    assert in_lines({"samplers": [], "uses": [{**told, "ways": []}], "left_out": 0}).count("\n") == 2


def test_loaders_of_text_encoders_are_known():
    prompt = whole()
    told = uses(prompt)["yes"]["forecast"]
    prompt["clip"] = node("CLIPLoader", clip_name=CLIP, type="stable_diffusion")
    theirs = uses(prompt)["yes"]
    assert theirs["forecast"] == told and [note["code"] for note in theirs["notes"]] == ["theirs", "text"]
    prompt["clip"] = node("DualCLIPLoader", clip_name1=CLIP, clip_name2=["somewhere", 0], type="flux")
    assert [note["code"] for note in uses(prompt)["yes"]["notes"]] == ["wired"]


def test_a_prompt_of_many_uses_is_bounded():
    prompt = decoding()
    prompt |= {f"more{n}": prompt["decode"] for n in range(9)}
    told = forecast(prompt)
    assert len(told["uses"]) == 8 and told["left_out"] == 2


def test_no_tensor_of_a_text_encoder_and_a_vae_is_read(models_dir, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # the tests' own, and slow
    t5, vae = (models_dir / folder / "forecast-hole.safetensors" for folder in ("text_encoders", "vae"))
    with weights_at_once():
        sizes = {t5: write_hole(t5, _t5({**T5XXL_SMALL, "d_model": 4096, "num_heads": 64}, torch.bfloat16))}
        sizes[vae] = write_hole(vae, sd_vae_entries(torch.bfloat16, 16, 128, False))
    prompt, before = whole(), set(models)
    prompt["clip"] = node("SpillwayLoadCLIP", clip_name1=t5.name, type="sd3")
    prompt["vae"]["inputs"]["vae_name"] = vae.name
    told = uses(prompt)
    read = {path: pages_in_ram(path) for path in sizes}
    assert sizes[t5] > 8 << 30 and told["yes"]["forecast"]["total"] > 0.9 * sizes[t5] - (1 << 29)
    assert told["decode"]["forecast"]["total"] >= sizes[vae]
    assert all(nbytes < 4 * MIB for nbytes in read.values()) and set(models) <= before
    for path in sizes:
        path.unlink()
