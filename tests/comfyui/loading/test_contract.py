"""The contract of ComfyUI's checkpoint loader: same arguments, same tuple, same log, same errors, same bits."""

import inspect
import logging
import re
from pathlib import Path

import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints, sampling
from kit.comfyui.pairs import assert_same, run
from spillway.ops.files.disk_map import DiskMap, SourceError
from spillway.ops.files.disk_maps import DiskMaps
from spillway.patcher.comfyui.loading import checkpoint as ours
from spillway.patcher.policy import Policy

THEIRS = comfy.sd.load_checkpoint_guess_config, comfy.sd.load_state_dict_guess_config
OURS = ours.load_checkpoint_guess_config, ours.load_state_dict_guess_config
POLICY = Policy(vram_bytes=0)
# Older versions have classic patchers alone.
NOT_DYNAMIC = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(THEIRS[0]).parameters else {}
MOVING = ("model_patcher.py", "model_management.py")


@pytest.fixture
def sd15(checkpoint):
    return checkpoint("sd15", mult=(1,))


def logged(caplog, call):
    """Return (result or error, ComfyUI's log lines) of a call."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        try:
            result = call()
        except Exception as error:  # compared with ComfyUI's
            result = error
    # What moving a model says differs, as ours do not move.
    said = [record for record in caplog.records if record.name == "root" and record.filename not in MOVING]
    # The order of keys is that of whoever read the file.
    return result, [(record.levelname, *sorted(re.findall(r"[\w.]+", record.getMessage()))) for record in said]


def both(caplog, which, *args, policy=None, **options):
    """(ours, ComfyUI's) of a call: the same tuple, the same log, and what was given is changed in the same way.

    which: 0 for a file, 1 for a state dict. ComfyUI writes into options, so each gets its own.
    """

    def given():
        return {name: dict(value) if isinstance(value, dict) else value for name, value in options.items()}

    theirs, own = given(), given()
    wanted, lines = logged(caplog, lambda: THEIRS[which](*args, **theirs))
    got, own_lines = logged(caplog, lambda: OURS[which](*args, **own, **({"policy": policy} if policy else {})))
    assert own_lines == lines
    assert theirs == own
    if isinstance(wanted, Exception):
        assert isinstance(got, type(wanted)), (got, wanted)
    else:
        assert type(got) is type(wanted) is tuple and kinds(got) == kinds(wanted)
    return got, wanted


def kinds(parts):
    return [type(part) for part in parts[1:]] + [type(parts[0].model) if parts[0] is not None else None]


def assert_same_parts(got, wanted):
    """Compare a model, a CLIP and a VAE by what they compute."""
    assert isinstance(got, tuple) and len(got) == len(wanted) == 4 and kinds(got) == kinds(wanted)
    model, clip, vae, _ = got
    if model is not None:
        assert model.is_dynamic()
        assert_same(run(model, steps=1), run(wanted[0], steps=1))
    if clip is not None:
        assert clip.patcher.is_dynamic()
        assert_same(sampling.text_encode(clip, "a red house"), sampling.text_encode(wanted[1], "a red house"))
    if vae is not None and vae.first_stage_model is not None:
        assert vae.patcher.is_dynamic()
        latent = sampling.latent(4, 32, 32)
        assert_same(sampling.vae_decode(vae, latent), sampling.vae_decode(wanted[2], latent))


@pytest.mark.parametrize("pair", [(THEIRS[0], OURS[0]), (THEIRS[1], OURS[1])], ids=["file", "state dict"])
def test_the_arguments_are_comfyuis(pair):
    """By name and place. What newer versions add stands last, and `policy` can only be named."""
    theirs, own = (list(inspect.signature(function).parameters) for function in pair)
    assert own[1 : len(theirs)] == theirs[1:] and own[len(theirs) :] == ["policy"]
    defaults = [[p.default or None for p in inspect.signature(f).parameters.values()][1:8] for f in pair]
    assert defaults[0] == defaults[1]


ASKED = {
    "all": {},
    "no VAE": {"output_vae": False},
    "no CLIP": {"output_clip": False},
    "CLIP vision": {"output_clipvision": True},
    "no model": {"output_model": False},
    "nothing": {"output_vae": False, "output_clip": False, "output_model": False},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_what_is_asked_for_comes(asked, sd15, caplog):
    got, wanted = both(caplog, 0, sd15, **asked, policy=POLICY)
    if asked == {}:
        assert_same_parts(got, wanted)
        model = got[0]
        assert model.dynamic.peak_resident_bytes == 0 and model.policy is POLICY
        # ComfyUI makes its copies for other devices in the same way.
        factory, arguments, *place = model.cached_patcher_init
        again = factory(*arguments)
        again = again[place[0]] if place else again
        assert again.is_dynamic() and again.policy is POLICY


def test_the_clip_vision_of_a_file_comes_where_it_is_asked_for(checkpoint, caplog):
    path = checkpoint("unclip")
    with checkpoints.small_clip_vision():
        assert both(caplog, 0, path)[0][3] is None
        got, wanted = both(caplog, 0, path, output_clipvision=True)
    outputs = [parts[3].encode_image(sampling.image(224, 224)).last_hidden_state for parts in (got, wanted)]
    assert_same(*outputs)


def test_a_part_that_is_not_there_is_what_comfyui_gives_for_it(checkpoint, caplog):
    """A VAE that raises when it is used, no CLIP, and ComfyUI's words about both."""
    path = checkpoint("sd15_unet", mult=(1,))
    wanted, lines = logged(caplog, lambda: THEIRS[0](path))
    got, own_lines = logged(caplog, lambda: OURS[0](path))
    assert own_lines == lines and got[1] is wanted[1] is None
    for vae in (got[2], wanted[2]):
        with pytest.raises(RuntimeError, match="VAE is invalid"):
            vae.throw_exception_if_invalid()


def test_keys_that_are_missing_or_left_over_are_logged_as_comfyui_logs_them(checkpoint, tmp_path, caplog):
    whole = comfy.utils.load_torch_file(checkpoint("sd15", mult=(1,)))
    lost = [
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.3.mlp.fc1.weight",
        "first_stage_model.decoder.norm_out.weight",
    ]
    assert all(whole.pop(key) is not None for key in lost)
    whole["of.another.model"] = torch.ones(3)
    path = str(tmp_path / "lacks.safetensors")
    comfy.utils.save_torch_file(whole, path)
    _, lines = logged(caplog, lambda: THEIRS[0](path))
    got, own_lines = logged(caplog, lambda: OURS[0](path))
    assert own_lines == lines
    said = [words for _, *line in lines for words in line]
    for key in lost:
        assert any(words.endswith(key.split(".", 2)[-1]) for words in said), key
    assert "of.another.model" in said
    with pytest.raises(SourceError, match=r"1 tensors that UNetModel needs are missing, such as input_blocks\.1\.0"):
        run(got[0])


def test_a_file_of_no_known_model_is_comfyuis_error(checkpoint, caplog):
    path = checkpoint("not_a_model")
    error, lines = logged(caplog, lambda: THEIRS[0](path))
    own, own_lines = logged(caplog, lambda: OURS[0](path))
    assert type(error) is type(own) is RuntimeError and str(own) == str(error) and own_lines == lines
    assert "Could not detect model type" in str(own)
    loaded = comfy.utils.load_torch_file(path)
    assert OURS[1](dict(loaded)) is None is THEIRS[1](dict(loaded))


@pytest.mark.parametrize("form", [str, lambda path: [str(path)]], ids=["one", "list"])
def test_the_embedding_directory_is_used(form, sd15, tmp_path, caplog):
    comfy.utils.save_torch_file({"emb_params": torch.randn(2, 768)}, str(tmp_path / "mine.safetensors"))
    prompt = "a house embedding:mine"
    loaded = both(caplog, 0, sd15, embedding_directory=form(tmp_path), output_model=False, output_vae=False)
    with_it, wanted = (sampling.text_encode(parts[1], prompt) for parts in loaded)
    assert_same(with_it, wanted)
    without = sampling.text_encode(OURS[0](sd15, output_model=False)[1], prompt)
    assert not torch.equal(with_it[0], without[0])
    # A name that is in none of them: ComfyUI's words, at the same moment.
    told = [
        logged(caplog, lambda parts=parts: sampling.text_encode(parts[1], "a embedding:none"))[1] for parts in loaded
    ]
    assert told[0] == told[1] and any("none" in words for line in told[0] for words in line)


class Counting(comfy.ops.manual_cast):
    """Op classes of one's own, which say that they were used."""

    class Linear(comfy.ops.manual_cast.Linear):
        used = 0

        def forward(self, *args, **kwargs):
            Counting.Linear.used += 1
            return super().forward(*args, **kwargs)


MODEL_OPTIONS = {
    "dtype": {"dtype": torch.float32},
    "weight_dtype": {"weight_dtype": torch.bfloat16},
    "fp8": {"dtype": torch.float8_e4m3fn},
    "devices": {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")},
    "operations": {"custom_operations": Counting},
}


@pytest.mark.parametrize("options", MODEL_OPTIONS.values(), ids=MODEL_OPTIONS)
def test_model_options_hold(options, sd15, caplog):
    asked = {"output_vae": False, "output_clip": False}
    got, wanted = both(caplog, 0, sd15, **asked, model_options=options)
    assert wanted[0].model.get_dtype() == got[0].model.get_dtype()
    assert (got[0].load_device, got[0].offload_device) == (wanted[0].load_device, wanted[0].offload_device)
    Counting.Linear.used = 0
    assert_same(run(got[0], steps=1), run(wanted[0], steps=1))
    assert bool(Counting.Linear.used) == ("custom_operations" in options)


TEXT_OPTIONS = {
    "dtype": {"dtype": torch.float32},
    "devices": {"load_device": torch.device("cpu"), "offload_device": torch.device("cpu")},
    "operations": {"custom_operations": Counting},
}


@pytest.mark.parametrize("options", TEXT_OPTIONS.values(), ids=TEXT_OPTIONS)
def test_options_of_the_text_encoder_hold(options, sd15, caplog):
    asked = {"output_vae": False, "output_model": False, "te_model_options": options}
    got, wanted = (parts[1] for parts in both(caplog, 0, sd15, **asked))
    dtypes = [clip.cond_stage_model.dtypes for clip in (got, wanted)]
    assert dtypes[0] == dtypes[1] and got.patcher.load_device == wanted.patcher.load_device
    Counting.Linear.used = 0
    assert_same(sampling.text_encode(got, "a red house"), sampling.text_encode(wanted, "a red house"))
    assert bool(Counting.Linear.used) == ("custom_operations" in options)


@pytest.mark.parametrize("which", [0, 1], ids=["file", "state dict"])
def test_a_classic_model_comes_where_it_is_asked_for(which, sd15, caplog):
    def given():
        return sd15 if which == 0 else comfy.utils.load_torch_file(sd15)

    wanted, lines = logged(caplog, lambda: THEIRS[which](given(), **NOT_DYNAMIC))
    got, own_lines = logged(caplog, lambda: OURS[which](given(), disable_dynamic=True))
    assert own_lines == lines and kinds(got) == kinds(wanted)
    for mine, theirs in ((got[0], wanted[0]), (got[1].patcher, wanted[1].patcher), (got[2].patcher, wanted[2].patcher)):
        assert not mine.is_dynamic() and type(mine) is type(theirs)
    assert_same(run(got[0], steps=1), run(wanted[0], steps=1))


def files_that_do_not_load(folder, sd15):
    """name -> path of what is no checkpoint at all."""
    data = Path(sd15).read_bytes()
    wrong = {
        "cut": data[: len(data) // 2],
        "cut in its header": data[:1000],
        "empty": b"",
        "a page": b"<html>" * 100,
        "a huge header": b"\xff" * 8 + data[8:2000],
    }
    paths = {"missing": folder / "none.safetensors", "a folder": folder}
    for name, content in wrong.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.safetensors"
        paths[name].write_bytes(content)
    return paths


def test_a_file_that_does_not_load_is_an_error_of_comfyuis_kind(sd15, tmp_path, caplog):
    """Whoever catches ComfyUI's error catches ours, which names the file."""
    for name, path in files_that_do_not_load(tmp_path, sd15).items():
        wanted, _ = logged(caplog, lambda path=path: THEIRS[0](str(path)))
        got, _ = logged(caplog, lambda path=path: OURS[0](str(path)))
        assert isinstance(wanted, Exception) and isinstance(got, Exception), name
        assert str(path) in str(got), (name, got)
        caught = next(kind for kind in (FileNotFoundError, OSError, ValueError, Exception) if isinstance(wanted, kind))
        assert isinstance(got, caught), (name, type(got), got, type(wanted), wanted)


@pytest.mark.parametrize("form", ["state dict", "views of a map", "map", "maps"])
def test_a_state_dict_or_a_map_gives_the_same_parts(form, sd15, tmp_path, caplog):
    """As in ComfyUI a state dict loses what is used. A map keeps all, and its numbers stay in the file."""
    loaded = comfy.utils.load_torch_file(sd15)
    wanted, lines = logged(caplog, lambda: THEIRS[1](dict(loaded)))
    if form == "maps":
        halves = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
        for index, half in enumerate(halves):
            comfy.utils.save_torch_file(dict(list(loaded.items())[index::2]), str(half))
        given = DiskMaps(halves)
    elif form == "map":
        given = DiskMap(sd15)
    else:
        source = DiskMap(sd15)
        given = dict(loaded) if form == "state dict" else source.state_dict()
    before = len(given)
    got, own_lines = logged(caplog, lambda: OURS[1](given, policy=POLICY))
    assert own_lines == lines
    assert (len(given) == before) == (form in ("map", "maps"))
    assert_same_parts(got, wanted)
    if form != "state dict":
        assert len(got[0].model.spillway_maps) == (2 if form == "maps" else 1)


def test_the_metadata_of_a_state_dict_is_used(checkpoint, caplog):
    """A VAE is told by it. That of a map is known."""
    path = checkpoint("sd15", mult=(1,), metadata={"config": '{"vae": {"x": 1}}'})
    seen = []
    plain = comfy.sd.VAE

    class Noting(plain):
        def __init__(self, *args, metadata=None, **kwargs):
            seen.append(metadata)
            super().__init__(*args, metadata=metadata, **kwargs)

    comfy.sd.VAE = Noting
    try:
        OURS[1](DiskMap(path))
        OURS[1](DiskMap(path).state_dict(), metadata={"mine": "yes"})
        OURS[0](path)
    finally:
        comfy.sd.VAE = plain
    assert [list(found) for found in seen] == [["config"], ["mine"], ["config"]]
