"""What the pack's other nodes, and hooks, make of models from GGUF files: the same as of their numbers in bf16."""

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch

from kit.comfyui import checkpoints
from kit.comfyui.hooks import hook_lora, hooked
from kit.comfyui.loras import LINEAR, MLP, QKV, forms, with_lora
from kit.comfyui.pairs import SMALL, assert_same, run
from kit.comfyui.saving import assert_same_tensors, cast, read, save
from kit.gguf_files import quantised_copy, write_gguf
from spillway.nodes.merge import DIFFERENCE, SUM, SpillwayMergeModels
from spillway.nodes.save import SpillwaySaveLora
from spillway.patcher.comfyui.loading.load import load_clip, load_diffusion_model, load_vae
from spillway.patcher.policy import Policy


def assert_same_numbers(got, wanted):
    """Of matrices: a GGUF file keeps the others in fp32, so a merge rounds them less."""
    matrices = [{key: part for key, part in tensors.items() if part.dim() > 1} for tensors in (got, wanted)]
    assert set(got) == set(wanted) and matrices[0]
    assert_same_tensors(*(cast(tensors, torch.float32) for tensors in matrices))


@pytest.fixture
def both(checkpoint, tmp_path, monkeypatch):
    """The same small Flux twice: from a GGUF file, and from a safetensors file of its numbers."""
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    written, stands_for = quantised_copy(comfy.utils.load_torch_file(checkpoint("flux", **SMALL)), "Q8_0")
    plain = checkpoints.write(tmp_path / "plain.safetensors", stands_for)
    return [load_diffusion_model(path) for path in (write_gguf(tmp_path / "flux.gguf", written), plain)]


@pytest.mark.parametrize("mode", [SUM, DIFFERENCE])
def test_merged_models(mode, both, checkpoint):
    others = [load_diffusion_model(checkpoint("flux", **SMALL, seed=seed)) for seed in (1, 2)]
    groups = dict.fromkeys(("early", "middle", "late", "other"), -1.0)

    def merged(first):
        models = {"model1": first, "model2": others[0], **({"model3": others[1]} if mode == DIFFERENCE else {})}
        return SpillwayMergeModels.execute(**models, mode=mode, ratio=0.3, **groups).args[0]

    got, wanted = map(merged, both)
    assert_same(run(got, steps=1), run(wanted, steps=1))
    assert_same_numbers(*(read(save(model, name=f"m{place}"))[0] for place, model in enumerate((got, wanted))))


def test_an_extracted_lora(both):
    """That was put beside the blocks comes back, as one of a model in bf16 does."""
    files = []
    for model in both:
        tuned = with_lora(model, forms("lora"), 1.0)
        given = {"model": tuned, "base": model, "rank": 4, "filename_prefix": "loras/x", "dtype": "fp32"}
        files.append(safetensors.torch.load_file(SpillwaySaveLora.execute(**given).args[0]))
    assert set(files[0]) == set(files[1])
    for stem in (QKV, LINEAR, MLP):
        exact = forms("lora")[f"{stem}.lora_up.weight"] @ forms("lora")[f"{stem}.lora_down.weight"] * 0.5
        found = files[0][f"{stem}.lora_up.weight"] @ files[0][f"{stem}.lora_down.weight"]
        assert (found - exact).norm() < (0.01 if model.dynamic.backend.in_place else 0.02) * exact.norm()


def test_the_difference_of_two_files(both, checkpoint, tmp_path):
    """Blocks have no address of their own by which two models could be taken for one."""
    other = comfy.utils.load_torch_file(checkpoint("flux", **SMALL, seed=1))
    written, stands_for = quantised_copy(other, "Q8_0")
    others = [
        load_diffusion_model(path)
        for path in (
            write_gguf(tmp_path / "other.gguf", written),
            checkpoints.write(tmp_path / "other.safetensors", stands_for),
        )
    ]
    keys = []
    for model, tuned in zip(both, others, strict=True):
        given = {"model": tuned, "base": model, "rank": 2, "filename_prefix": "loras/d", "dtype": "fp32"}
        keys.append(set(safetensors.torch.load_file(SpillwaySaveLora.execute(**given).args[0])))
    assert keys[0] == keys[1] and len(keys[0]) > 20


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with a LoRA"])
def test_hooks(beside, both):
    """They change the numbers. Without them the weight is in its blocks again."""
    results = []
    for model in both:
        model.set_policy(Policy(vram_bytes=0))
        plainly = run(model, steps=1)
        patched = with_lora(model, forms("lora"), 0.5) if beside else model
        results.append(hooked(patched, hook_lora("loha", keyframes=[(0.5, 0.0), (1.0, 0.5)])))
        assert_same(run(model, steps=1), plainly)
    # Beside the blocks a LoRA is exact, and merged into bf16 it is rounded.
    assert float((results[0] - results[1]).abs().max()) <= (1e-3 if beside else 0)


def test_a_saved_checkpoint(both, checkpoint, tmp_path, monkeypatch):
    written, stands_for = quantised_copy(comfy.utils.load_torch_file(checkpoint("clip_l", layers=2)), "Q5_0")
    original = comfy.sd.load_clip
    options = checkpoints.small_options(clip_layers=2)
    monkeypatch.setattr(comfy.sd, "load_clip", lambda **named: original(**named, model_options=dict(options)))
    clips = [
        load_clip([path])
        for path in (
            write_gguf(tmp_path / "clip.gguf", written, {"general.architecture": "pig"}),
            checkpoints.write(tmp_path / "clip.safetensors", stands_for),
        )
    ]
    vae = load_vae(checkpoint("wan_vae"))
    pairs = enumerate(zip(both, clips, strict=True))
    saved = [read(save(model, clip=clip, vae=vae, name=f"c{place}"))[0] for place, (model, clip) in pairs]
    assert_same_numbers(*saved)
