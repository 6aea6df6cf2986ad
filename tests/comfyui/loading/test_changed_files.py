"""Files that change under a graph: a LoRA's numbers stay those that were loaded, and a model is never a mix of two."""

import os
import shutil
import time

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple

from kit.comfyui import checkpoints
from kit.comfyui.loras import forms
from kit.comfyui.pairs import assert_same, pair, run
from spillway.nodes import load, lora, probe
from spillway.ops.files import read_whole
from spillway.ops.files.watched_file import FileChanged
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.comfyui.patches import lora as reading
from spillway.patcher.comfyui.saving.save import save_model
from spillway.patcher.policy import Policy

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody change a mapped file")


def overwrite(path, start=0.0):
    """Write zeros over the numbers of a file from a fraction of it on, in place."""
    with open(path, "r+b") as file:
        base = 8 + int.from_bytes(file.read(8), "little")
        file.seek(base + int((os.path.getsize(path) - base) * start) // 8 * 8)
        file.write(bytes(os.path.getsize(path) - file.tell()))


@pytest.fixture
def model_file(flux, tmp_path):
    return shutil.copy(flux, tmp_path / "model.safetensors")


@pytest.fixture
def lora_file(models_dir):
    path = models_dir / "loras" / "changes.safetensors"
    checkpoints.write(path, forms("lora"))
    yield path
    path.unlink(missing_ok=True)
    reading._kept.clear()


def with_lora(model, path):
    return lora.SpillwayLoraLoaderModelOnly.execute(model=model, lora_name=path.name, strength_model=1.0).args[0]


@pytest.mark.parametrize("change", [overwrite, lambda path: os.truncate(path, 100), os.unlink])
@pytest.mark.parametrize("weight_dtype", ["default", "int8"])
def test_a_lora_stays_as_it_was_loaded(weight_dtype, change, flux, lora_file, tmp_path):
    wanted = run(with_lora(load_diffusion_model(flux, weight_dtype), lora_file))
    model = with_lora(load_diffusion_model(flux, weight_dtype, Policy(vram_bytes=0, pinned_bytes=0)), lora_file)
    whole = lora_file.read_bytes()
    change(lora_file)
    assert_same(run(model), wanted)
    save_model(str(tmp_path / "saved.safetensors"), model)
    lora_file.write_bytes(whole)


def test_a_lora_that_was_written_again_is_read_again(flux, lora_file):
    ours = load_diffusion_model(flux)
    before = run(with_lora(ours, lora_file))
    doubled = {key: 2 * tensor for key, tensor in forms("lora").items()}
    checkpoints.write(lora_file, doubled)
    classic, _ = pair(flux)
    wanted = run(comfy.sd.load_lora_for_models(classic, None, doubled, 1.0, 0)[0])
    got = run(with_lora(ours, lora_file))
    assert not torch.equal(got, before)
    assert_same(got, wanted)


@pytest.mark.parametrize("mode", ["merge", "side branch"])
def test_a_lora_too_large_for_memory_is_an_error_once_it_changes(mode, flux, lora_file, monkeypatch):
    monkeypatch.setattr(read_whole, "SHARE", 1 << 40)
    policy = Policy(vram_bytes=0, pinned_bytes=0, int8_lora=mode)
    model = with_lora(load_diffusion_model(flux, "int8", policy), lora_file)
    run(model)
    overwrite(lora_file)
    with pytest.raises(FileChanged, match=r"changes\.safetensors: this file was written to while it was in use"):
        run(model)


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn", "int8"])
@pytest.mark.parametrize("start", [0.0, 0.9])
def test_a_model_that_changes_is_an_error_that_names_it(start, weight_dtype, model_file, tmp_path):
    """Before it runs, and while it is saved. What was half saved is not left."""
    model = load_diffusion_model(str(model_file), weight_dtype, Policy(vram_bytes=0, pinned_bytes=0))
    run(model)
    overwrite(model_file, start)
    with pytest.raises(FileChanged, match=r"model\.safetensors: this file was written to while it was in use"):
        run(model)
    with pytest.raises(FileChanged, match=r"model\.safetensors: "):
        save_model(str(tmp_path / "saved.safetensors"), model)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_merge_notices_changes_of_the_other_model(flux, model_file, tmp_path):
    """Its weights are read by patches, outside of every loan of its own."""
    ours = load_diffusion_model(flux, policy=Policy(vram_bytes=0, pinned_bytes=0))
    other = load_diffusion_model(str(model_file))
    (merged,) = ModelMergeSimple().merge(ours, other, 0.5)
    run(merged)
    overwrite(model_file)
    with pytest.raises(FileChanged, match=r"model\.safetensors: "):
        run(merged)
    with pytest.raises(FileChanged, match=r"model\.safetensors: "):
        save_model(str(tmp_path / "saved.safetensors"), merged)


LOADERS = {
    load.SpillwayLoadDiffusionModel: ("diffusion_models", "unet_name"),
    load.SpillwayLoadCheckpoint: ("checkpoints", "ckpt_name"),
    load.SpillwayLoadCLIP: ("text_encoders", "clip_name3"),
    load.SpillwayLoadVAE: ("vae", "vae_name"),
    lora.SpillwayLoraLoader: ("loras", "lora_name"),
    lora.SpillwayLoraLoaderModelOnly: ("loras", "lora_name"),
    lora.SpillwayLoraStack: ("loras", "lora_6"),
    probe.SpillwayProbeModel: ("vae", "file"),
}


@pytest.mark.parametrize("node", LOADERS)
def test_every_loader_runs_again_when_its_file_is_another_one(node, models_dir):
    """ComfyUI asks for the fingerprint before each prompt, with the literals of the node alone.

    The other file has the size and the time of the first, but for Windows, which tells of no other time.
    """
    folder, name = LOADERS[node]
    path = models_dir / folder / "stamped.safetensors"
    path.parent.mkdir(exist_ok=True)
    given = {"clip_name1": "gone.safetensors"} if node is load.SpillwayLoadCLIP else {}
    given[name] = f"vae/{path.name}" if node is probe.SpillwayProbeModel else path.name
    seen = []
    try:
        for content in (b"one", b"two"):
            path.write_bytes(content)
            os.utime(path, ns=(0, len(seen) if os.name == "nt" else 0))
            seen.append(node.fingerprint_inputs(**given))
            assert node.fingerprint_inputs(**given) == seen[-1]
            time.sleep(0.02)  # a system's clock for files may be that coarse
        path.unlink()
        seen.append(node.fingerprint_inputs(**given))
    finally:
        path.unlink(missing_ok=True)
    assert seen[0] != seen[1] != seen[2] != seen[0]


def names_a_file(entry):
    return "_name" in entry.id or entry.id.startswith("lora_") or entry.id == "file"


def test_every_node_that_names_a_file_has_a_fingerprint():
    modules = (load, lora, probe)
    nodes = [node for module in modules for name, node in vars(module).items() if name.startswith("Spillway")]
    name_files = {node for node in nodes if any(map(names_a_file, node.define_schema().inputs))}
    assert name_files == set(LOADERS)
