"""The LoRA nodes: what comes out runs like ComfyUI's LoraLoader's, and what does not fit is said."""

import logging
import os
import time

import comfy.sd
import comfy.utils
import nodes as comfyui_nodes
import pytest
import torch

from kit.comfyui import checkpoints, sampling
from kit.comfyui.loras import LINEAR, MLP, QKV, SHAPES, forms, numbers
from kit.comfyui.pairs import assert_same, brought, budget, counters, pair, run
from spillway.nodes.lora import SpillwayLoraLoader, SpillwayLoraLoaderModelOnly, SpillwayLoraStack
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.comfyui.patches import lora as comfy_lora
from spillway.patcher.policy import Policy

TEXT = "a small red house"
TE_STEM = "lora_te_text_model_encoder_layers_3_mlp_fc1"


def for_clip(seed=0):
    return {
        f"{TE_STEM}.lora_up.weight": numbers(3072, 4, seed=seed, scale=0.3),
        f"{TE_STEM}.lora_down.weight": numbers(4, 768, seed=seed, scale=0.3),
    }


@pytest.fixture
def lora_file(models_dir):
    """`lora_file("a", tensors)`: the name of such a file in models/loras."""
    made = []

    def write(name, tensors, **options):
        path = models_dir / "loras" / f"{name}.safetensors"
        checkpoints.write(path, tensors, **options)
        made.append(path)
        return path.name

    yield write
    for path in made:
        path.unlink(missing_ok=True)
    comfy_lora._kept.clear()


def stack(model, *loras, clip=None):
    slots = {}
    for place, (name, strength) in enumerate(loras, 1):
        slots |= {f"lora_{place}": name, f"strength_{place}": strength}
    return SpillwayLoraStack.execute(model=model, clip=clip, **slots).args


def comfyui_lora(model, clip, name, strength_model, strength_clip):
    return comfyui_nodes.LoraLoader().load_lora(model, clip, name, strength_model, strength_clip)


def test_a_lora_on_model_and_clip_gives_what_comfyuis_node_gives(flux, checkpoint, lora_file):
    """Both halves of a LoRA, on the pack's models and on ComfyUI's, against ComfyUI's node."""
    name = lora_file("both", {**forms("lora"), **for_clip()}, metadata={"trained_by": "us"})
    classic, ours = pair(flux, 0.5)
    classic_clip = comfy.sd.load_clip([checkpoint("clip_l")])
    our_clip = comfy_load.load_clip([checkpoint("clip_l")], policy=budget(classic_clip.patcher, 0.5))
    strengths = {"strength_model": 0.7, "strength_clip": -0.4}
    model, clip = comfyui_lora(classic, classic_clip, name, 0.7, -0.4)
    wanted = [run(model), *sampling.text_encode(clip, TEXT)]
    assert not torch.equal(wanted[0], run(classic))
    assert not torch.equal(wanted[1], sampling.text_encode(classic_clip, TEXT)[0])
    for one, other in ((ours, our_clip), (classic, classic_clip)):
        output = SpillwayLoraLoader.execute(model=one, clip=other, lora_name=name, **strengths)
        model, clip = output.args
        assert model is not one and clip is not other and output.ui is None
        assert model.get_attachment("lora_metadata") == {"trained_by": "us"}
        assert_same([run(model), *sampling.text_encode(clip, TEXT)], wanted)


def test_a_lora_on_the_model_alone_ignores_the_text_encoders_half(flux, lora_file, caplog):
    """The text encoder's half of the file is no reason to warn: there is nothing that could take it."""
    name = lora_file("both", {**forms("loha"), **for_clip()})
    classic, ours = pair(flux, 0.5)
    output = SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=name, strength_model=0.5)
    assert output.ui is None and "fit" not in caplog.text
    (wanted,) = comfyui_nodes.LoraLoaderModelOnly().load_lora_model_only(classic, name, 0.5)
    assert_same(run(output.args[0]), run(wanted))


def test_a_stack_gives_what_its_loras_give_one_after_the_other(flux, checkpoint, lora_file):
    files = [lora_file(kind, {**forms(kind), **for_clip(seed)}) for seed, kind in enumerate(("lora", "dora", "diff"))]
    classic, ours = pair(flux, 0.5)
    clip = classic_clip = comfy.sd.load_clip([checkpoint("clip_l")])
    wanted = classic
    loras = list(zip(files, (0.5, -0.3, 0.8), strict=True))
    for name, strength in loras:
        wanted, classic_clip = comfyui_lora(wanted, classic_clip, name, strength, strength)
    model, clip = stack(ours, *loras[:2], ("none", 1.0), loras[2], clip=clip)
    assert_same(run(model), run(wanted))
    assert_same(sampling.text_encode(clip, TEXT), sampling.text_encode(classic_clip, TEXT))


def test_a_strength_of_zero_passes_the_model_through(flux, checkpoint, models_dir, lora_file):
    """Where both strengths are 0 the file is not even read."""
    classic, ours = pair(flux)
    clip = comfy.sd.load_clip([checkpoint("clip_l")])
    (models_dir / "loras" / "broken.safetensors").write_bytes(b"no LoRA")
    zero = {"strength_model": 0.0, "strength_clip": 0.0}
    assert SpillwayLoraLoader.execute(model=ours, clip=clip, lora_name="broken.safetensors", **zero).args == (
        ours,
        clip,
    )
    assert stack(ours, ("broken.safetensors", 0.0), ("none", 1.0), clip=clip) == (ours, clip)
    name = lora_file("both", {**forms("set"), **for_clip()})
    model, changed = SpillwayLoraLoader.execute(
        model=ours, clip=clip, lora_name=name, strength_model=0.0, strength_clip=1.0
    ).args
    assert model is ours and changed is not clip
    model, same = SpillwayLoraLoader.execute(
        model=ours, clip=clip, lora_name=name, strength_model=1.0, strength_clip=0.0
    ).args
    assert same is clip and not torch.equal(run(model), run(classic))


def test_a_lora_of_which_nothing_fits_is_an_error_that_names_keys_of_both_sides(flux, checkpoint, lora_file):
    """The error names the file, three keys of each side, and what to do."""
    _, ours = pair(flux)
    theirs = {f"transformer.h.{layer}.lora_up.weight": numbers(4, 4) for layer in range(5)}
    name = lora_file("gpt", theirs)
    clip = comfy.sd.load_clip([checkpoint("clip_l")])
    with pytest.raises(comfy_lora.NoFit) as caught:
        SpillwayLoraLoader.execute(model=ours, clip=clip, lora_name=name, strength_model=1.0, strength_clip=1.0)
    words = str(caught.value)
    assert "gpt.safetensors" in words and "another kind of model" in words and "and 2 more" in words
    assert sum(key in words for key in theirs) == 3
    for side in (ours, clip.patcher):
        assert sum(f"{key}," in words or f"{key} and" in words for key in side.model.state_dict()) == 3
    assert not ours.patches and not clip.patcher.patches


def test_a_text_encoder_lora_without_a_text_encoder_is_an_error(flux, lora_file):
    _, ours = pair(flux)
    with pytest.raises(comfy_lora.NoFit, match=r"te\.safetensors.*text encoder only: connect the CLIP"):
        SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=lora_file("te", for_clip()), strength_model=1.0)


def test_a_lora_of_which_a_part_fits_is_applied_with_a_warning(flux, lora_file, caplog):
    """A warning with counts, in the log and on the node; what fits is applied."""
    strange = {f"diffusion_model.no_such_layer.{part}.lora_up.weight": numbers(4, 4) for part in range(5)}
    name = lora_file("mixed", {**forms("lora"), **strange})
    classic, ours = pair(flux)
    with caplog.at_level(logging.WARNING):
        output = SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=name, strength_model=1.0)
    (shown,) = output.ui.as_dict()["text"]
    assert shown in caplog.text
    assert shown.startswith(f"mixed.safetensors: {2 * len(SHAPES)} of {2 * len(SHAPES) + 5} tensors fit. 5 do not")
    assert shown.count("no_such_layer") == 3
    (wanted, _) = comfy.sd.load_lora_for_models(classic, None, forms("lora"), 1.0, 0)
    assert_same(run(output.args[0]), run(wanted))


KINDS = ["lora", "dora", "loha", "lokr", "glora", "oft", "diff", "set"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_which_names_fit_but_not_shapes_is_named(kind, flux, lora_file, caplog):
    """The node says which tensors, and applies the others. ComfyUI would log an error at each use, or raise."""
    lora = forms(kind, wrong=[LINEAR])
    good = {key: tensor for key, tensor in lora.items() if not key.startswith(LINEAR)}
    classic, ours = pair(flux)
    output = SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=lora_file("mixed", lora), strength_model=1.0)
    (shown,) = output.ui.as_dict()["text"]
    assert f"{LINEAR}." in shown and f"for {LINEAR}.weight [896, 128]" in shown and shown in caplog.text
    assert "have another shape" in shown and QKV not in shown and MLP not in shown
    caplog.clear()
    (wanted, _) = comfy.sd.load_lora_for_models(classic, None, good, 1.0, 0)
    assert_same(run(output.args[0]), run(wanted))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_which_no_shape_fits_is_refused(kind, flux, lora_file):
    _, ours = pair(flux)
    name = lora_file("half", forms(kind, wrong=list(SHAPES)))
    with pytest.raises(
        comfy_lora.NoFit, match=r"half\.safetensors: no tensor.*not their shapes.* for .*model of another"
    ):
        SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=name, strength_model=1.0)
    assert not ours.patches


@pytest.mark.parametrize("kind", KINDS)
def test_right_shapes_are_found_right_and_no_number_is_read(kind, flux, lora_file, caplog):
    """OFT with a constraint looks at its numbers first."""
    lora = forms(kind)
    if kind == "oft":
        lora |= {f"{stem}.alpha": torch.tensor(0.5) for stem in SHAPES}
    _, ours = pair(flux)
    output = SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=lora_file("good", lora), strength_model=1.0)
    assert output.ui is None and len(output.args[0].patches) >= len(SHAPES) and not caplog.records


@pytest.mark.parametrize("content", [b"no LoRA", b"\x10\0\0\0\0\0\0\0{}              ", b""])
def test_a_broken_file_is_an_error_and_leaves_the_model_unpatched(content, flux, models_dir):
    _, ours = pair(flux)
    (models_dir / "loras" / "broken.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.safetensors: .*(cannot be read|no tensors).*Download it again"):
        SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name="broken.safetensors", strength_model=1.0)
    assert not ours.patches


def test_a_missing_file_is_an_error_before_any_file_is_read(flux, lora_file):
    """Said before any other file is read."""
    _, ours = pair(flux)
    with pytest.raises(FileNotFoundError, match=r"no file 'gone\.safetensors' in .*loras"):
        stack(ours, (lora_file("there", forms("lora")), 1.0), ("gone.safetensors", 1.0))


def test_a_file_is_read_once_until_it_changes(flux, lora_file, models_dir, monkeypatch):
    """And again when it was written again."""
    classic, ours = pair(flux)
    read, plain = [], comfy_lora._read
    monkeypatch.setattr(comfy_lora, "_read", lambda path: read.append(path) or plain(path))
    name = lora_file("twice", forms("lora"))
    for strength in (1.0, 0.5, 0.7):
        SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=name, strength_model=strength)
    assert len(read) == 1
    lora_file("twice", forms("loha"))
    (model,) = SpillwayLoraLoaderModelOnly.execute(model=ours, lora_name=name, strength_model=1.0).args
    assert len(read) == 2
    wanted = comfy.sd.load_lora_for_models(classic, None, forms("loha"), 1.0, 0)[0]
    assert_same(run(model), run(wanted))


@pytest.mark.parametrize("kind", ["lora", "diff"])
def test_only_the_weights_of_a_changed_lora_are_computed_again(kind, flux, lora_file):
    """The node runs as a whole, yet only the weights of the changed LoRA are computed again."""
    _, ours = pair(flux, 1.0)
    ours.set_policy(Policy())  # on a device of its own, buffers would take a part of the budget
    by_stem = {stem: {key: t for key, t in forms(kind).items() if key.startswith(stem)} for stem in SHAPES}
    files = [lora_file(f"part{place}", tensors) for place, tensors in enumerate(by_stem.values())]
    run(stack(ours, *((name, 1.0) for name in files))[0])
    before = counters(ours)
    run(stack(ours, (files[0], 1.0), (files[1], 0.5), (files[2], 1.0))[0])
    after = counters(ours)
    touched = list(SHAPES)[1]
    size = next(brought(ours, b) for b in ours.dynamic.bundles if any(p.key == f"{touched}.weight" for p in b.params))
    assert after.bytes_loaded - before.bytes_loaded == size
    assert after.patched - before.patched == (2 if kind == "diff" else 1)  # a weight, and in a diff its bias


@pytest.mark.parametrize("way", ["by rename", "by rename, same time", "in place", "in place, same time"])
def test_a_file_that_is_replaced_is_read_again(lora_file, models_dir, way):
    """Its size stays, and the time of its content can be set to what it was."""
    name = lora_file("replaced", {"a": torch.zeros(8)})
    path = models_dir / "loras" / name
    before = path.stat()
    (first, _), (again, _) = comfy_lora.read_lora(str(path)), comfy_lora.read_lora(str(path))
    assert first is again and not first["a"].any()
    time.sleep(0.02)  # the times of a file have steps
    other = models_dir / "loras" / lora_file("other", {"a": torch.ones(8)})
    if way.startswith("in place"):
        with path.open("r+b") as file:
            file.write(other.read_bytes())
    else:
        os.replace(other, path)
    if way.endswith("same time"):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert comfy_lora.read_lora(str(path))[0]["a"].all()
