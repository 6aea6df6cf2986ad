"""The nodes that save: names of files, metadata, report, progress and errors."""

import os
import types

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
from comfy.cli_args import args

from kit.comfyui import checkpoints
from kit.comfyui.loras import QKV
from kit.comfyui.pairs import SMALL
from kit.comfyui.saving import read, save
from spillway.nodes.save import SpillwaySaveCheckpoint, SpillwaySaveDiffusionModel, SpillwaySaveLora
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.files.safetensors_writer import SaveError
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_clip, load_diffusion_model, load_vae

pytestmark = pytest.mark.usefixtures("output")


def test_the_workflow_is_in_the_metadata_unless_that_is_turned_off(checkpoint, monkeypatch):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    hidden = types.SimpleNamespace(prompt={"1": {"class_type": "X"}}, extra_pnginfo={"workflow": {"nodes": []}})
    monkeypatch.setattr(SpillwaySaveDiffusionModel, "hidden", hidden)
    _, metadata = read(save(model))
    assert metadata["prompt"] == '{"1": {"class_type": "X"}}' and metadata["workflow"] == '{"nodes": []}'
    monkeypatch.setattr(args, "disable_metadata", True)
    assert not read(save(model))[1]


@pytest.mark.parametrize(
    "said", ["x", ["workflow"], 7, True, {"\ud800": 1, "workflow": {"a \ud800": []}}], ids=range(5)
)
@pytest.mark.parametrize("node", ["model", "checkpoint", "LoRA"])
def test_whatever_was_sent_with_the_prompt_is_no_error(node, said, checkpoint, monkeypatch, tmp_path):
    """ComfyUI looks at none of it. What a file can hold is in it."""
    hidden = types.SimpleNamespace(prompt={"1": {"class_type": "X"}}, extra_pnginfo=said)
    for kind in (SpillwaySaveDiffusionModel, SpillwaySaveCheckpoint, SpillwaySaveLora):
        monkeypatch.setattr(kind, "hidden", hidden)
    if node == "checkpoint":
        model, clip, vae = load_checkpoint(checkpoint("sd15", mult=(1,)))[:3]
        saved = SpillwaySaveCheckpoint.execute(model=model, clip=clip, vae=vae, filename_prefix="x")
    else:
        model = load_diffusion_model(checkpoint("flux", **SMALL))
        base = load_diffusion_model(checkpoint("flux", seed=1, **SMALL))
        more = {"base": base, "rank": 1} if node == "LoRA" else {}
        kind = SpillwaySaveLora if more else SpillwaySaveDiffusionModel
        saved = kind.execute(model=model, filename_prefix="x", **more)
    _, metadata = read(saved.args[0])
    assert "prompt" in metadata and ("workflow" in metadata) == isinstance(said, dict)


@pytest.mark.parametrize("prefix", ["../evil", "a/../../evil", "/evil", "", " ", ".", "a/..", "..", "a\0b"])
def test_names_outside_the_output_folder_are_refused(prefix, checkpoint, tmp_path):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    before = sorted(tmp_path.parent.rglob("*evil*"))
    with pytest.raises(ValueError, match=r"outside the output folder|names no file"):
        save(model, name=prefix)
    assert sorted(tmp_path.parent.rglob("*evil*")) == before and not os.path.exists("/evil_00001_.safetensors")


def test_a_subfolder_is_made(checkpoint, tmp_path):
    saved = save(load_diffusion_model(checkpoint("flux", **SMALL)), name="a/b/c%year%")
    assert os.path.dirname(saved) == str(tmp_path / "a" / "b") and os.path.basename(saved).startswith("c20")


def test_two_servers_that_save_under_one_prefix_lose_nothing(checkpoint, tmp_path, monkeypatch):
    """The other one is done first, with the number that both saw. The report names the file that was written."""
    other = tmp_path / "x_00001_.safetensors"
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: other.write_bytes(b"the other server's"))
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    path, words = (
        (out := SpillwaySaveDiffusionModel.execute(model=model, filename_prefix="x")).args[0],
        out.ui.as_dict(),
    )
    assert other.read_bytes() == b"the other server's"
    assert path == str(tmp_path / "x_00002_.safetensors") and words["text"][0].startswith("x_00002_.safetensors: ")
    assert read(path)[0]


def test_the_report_says_name_size_and_speed(checkpoint):
    out = SpillwaySaveDiffusionModel.execute(
        model=load_diffusion_model(checkpoint("flux", **SMALL)), filename_prefix="x", dtype="as loaded"
    )
    size = os.path.getsize(out.args[0])
    (words,) = out.ui.as_dict()["text"]
    assert words.startswith(f"x_00001_.safetensors: {size:,} bytes in ") and "MB/s" in words


def test_the_stop_button_leaves_no_file(checkpoint, tmp_path):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(model)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_progress_counts_bytes_up_to_all(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    saved = save(load_diffusion_model(checkpoint("flux", **SMALL)))
    total = sum(spec.nbytes for spec in (DiskMap(saved).spec(key) for key in DiskMap(saved).keys()))  # noqa: SIM118
    assert seen[0] == (0, total) and seen[-1] == (total, total)


def test_numbers_too_large_for_fp16_are_an_error(checkpoint, tmp_path):
    """In the file: a device makes patches in fp16, where such a number is infinite for the model too."""
    tensors = comfy.utils.load_torch_file(checkpoint("flux", **SMALL))
    tensors[f"{QKV.removeprefix('diffusion_model.')}.weight"].fill_(1 << 20)
    model = load_diffusion_model(checkpoints.write(tmp_path / "large" / "large.safetensors", tensors))
    with pytest.raises(SaveError, match=r"qkv\.weight' holds numbers up to 1\.04858e\+06; fp16 ends at 65504"):
        save(model, "fp16")
    with pytest.raises(ValueError, match=r"'dtype' is 'fp9' \(str\); expected one of as loaded, bf16"):
        save(model, "fp9")


def test_a_weight_that_the_file_lacks_is_an_error_with_its_name(checkpoint):
    lacking = "text_model.final_layer_norm.weight"
    clip = load_clip([checkpoint("clip_l", drop=(lacking,))])
    model, vae = load_diffusion_model(checkpoint("flux", **SMALL)), load_vae(checkpoint("flux_vae"))
    with pytest.raises(SaveError, match=rf"{lacking}' has no data: the file .* lacks it"):
        save(model, clip=clip, vae=vae)
