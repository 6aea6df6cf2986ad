"""Saved models: what the core's own save nodes would write, from models in any state, and loaders read it."""

import os
import types

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import safetensors.torch
import torch
from comfy.cli_args import args
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy_extras.nodes_model_merging import CheckpointSave, ModelSave

from kit.comfyui import checkpoints, sampling
from kit.comfyui.loras import LINEAR, QKV, forms, numbers, with_lora
from kit.comfyui.pairs import SMALL, assert_same, budget, core_vae, run
from spillway.nodes import save as save_nodes
from spillway.nodes.save import SpillwaySaveCheckpoint, SpillwaySaveDiffusionModel
from spillway.ops.files import deferred
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.files.safetensors_writer import SaveError
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_clip, load_diffusion_model, load_vae
from spillway.patcher.comfyui.saving.save import QUANTISATIONS, SAVE_DTYPES
from spillway.patcher.comfyui.saving.target import journal

PREFIX = "model.diffusion_model."
TEXT = "text_model.encoder.layers.3.self_attn.q_proj"


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    yield tmp_path
    left = [path.name for path in tmp_path.rglob("*") if "spillway-" in path.name]
    assert not left and not (journal().is_dir() and os.listdir(journal()))


@pytest.fixture
def small_parts(monkeypatch):
    """Weights of the small models are large ones: they are made in several parts."""
    monkeypatch.setattr(deferred, "PART_BYTES", 1 << 15)


def save(model, dtype="as loaded", name="ours", **others):
    node = SpillwaySaveCheckpoint if others else SpillwaySaveDiffusionModel
    return node.execute(model=model, filename_prefix=name, dtype=dtype, **others).args[0]


def core_save(model, name="core", **others):
    """The path of the file that the core's node writes."""
    target = save_nodes.checkpoint_target(model, name).path
    node = CheckpointSave() if others else ModelSave()
    node.output_dir = folder_paths.get_output_directory()
    node.save(model=model, filename_prefix=name, **others)
    return target


def read(path):
    """(tensors, metadata), by the reference implementation."""
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same_tensors(got, wanted):
    assert set(got) == set(wanted)
    for key in wanted:
        assert got[key].dtype == wanted[key].dtype and got[key].shape == wanted[key].shape, key
        assert torch.equal(got[key].reshape(-1).view(torch.uint8), wanted[key].reshape(-1).view(torch.uint8)), key


def cast(tensors, dtype):
    return {key: t.to(dtype) if t.dtype.is_floating_point else t for key, t in tensors.items()}


def like(tensors, others):
    return {key: tensor.to(others[key].dtype) for key, tensor in tensors.items()}


def everywhere(path, tmp_path, **options):
    return comfy.utils.load_torch_file(checkpoints.lora(tmp_path / "lora" / "lora.safetensors", path, **options))


# --- diffusion models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.25, 0.0])
def test_as_the_core_saves(fraction, checkpoint, tmp_path, small_parts):
    """A LoRA on every layer: the core's file bit for bit, at any budget, before and after a run."""
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    lora = everywhere(path, tmp_path)
    core = comfy.sd.load_diffusion_model(path)
    ours = load_diffusion_model(path, policy=budget(core, fraction))
    core, ours = with_lora(core, lora, 0.7), with_lora(ours, lora, 0.7)
    first = save(ours)
    wanted_run = run(core)
    assert_same(run(ours), wanted_run)
    second = save(ours)
    names = [os.path.basename(path) for path in (first, second)]
    assert names == ["ours_00001_.safetensors", "ours_00002_.safetensors"]
    assert open(first, "rb").read() == open(second, "rb").read()  # noqa: SIM115
    (got, metadata), (wanted, core_metadata) = read(first), read(core_save(core))
    assert_same_tensors(got, wanted)
    assert metadata == core_metadata
    for load in (comfy.sd.load_diffusion_model, load_diffusion_model):
        assert_same(run(load(first)), wanted_run)


@pytest.mark.parametrize("dtype", [name for name in SAVE_DTYPES if name not in QUANTISATIONS])
def test_dtypes(dtype, checkpoint, tmp_path, small_parts):
    """The patched weights in the rounding of the dtype; as loaded is the file's, though a CPU computes in fp32."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    core, ours = with_lora(comfy.sd.load_diffusion_model(path), lora), with_lora(load_diffusion_model(path), lora)
    wanted, _ = read(core_save(core))
    kept = {"as loaded": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    saved = save(ours, dtype)
    assert_same_tensors(read(saved)[0], cast(wanted, kept))
    # The latents are those of the patched original with its weights so rounded.
    rounded = {key.removeprefix(PREFIX): tensor for key, tensor in cast(cast(wanted, kept), torch.float32).items()}
    reference = comfy.sd.load_diffusion_model_state_dict(rounded)
    assert_same(run(comfy.sd.load_diffusion_model(saved)), run(reference))


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "glora", "oft", "diff", "set"])
def test_kinds_of_patches(kind, checkpoint, small_parts):
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    models = [with_lora(load(path), forms(kind), 0.8) for load in (comfy.sd.load_diffusion_model, load_diffusion_model)]
    wanted, _ = read(core_save(models[0]))
    got, _ = read(save(models[1]))
    assert_same_tensors(got, wanted)
    plain = DiskMap(path)
    assert not torch.equal(got[f"{PREFIX}{QKV[16:]}.weight"], plain.tensor(f"{QKV[16:]}.weight"))


def test_patches_of_some_rows(checkpoint, small_parts):
    """As the core makes them of LoRAs with a matrix for each of query, key and value; and several on one weight."""
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    files = []
    for load, saver in ((comfy.sd.load_diffusion_model, core_save), (load_diffusion_model, save)):
        model = with_lora(load(path), forms("lora"), 0.3)
        for start, length in ((0, 128), (100, 200), (383, 1)):
            patch = ("diff", (numbers(length, 128, seed=start),))
            model.add_patches({(f"{QKV}.weight", (0, start, length)): patch}, 0.5, 0.9)
            model.add_patches({(f"{LINEAR}.weight", (1, 5, 7)): ("diff", (numbers(896, 7, seed=start),))}, 0.5)
        model.add_patches({(f"{QKV}.weight", None, lambda diff: diff * 2): ("diff", (numbers(384, 128),))}, 0.5)
        files.append(read(saver(model))[0])
    assert_same_tensors(files[1], files[0])


def test_the_cores_models(checkpoint, tmp_path, small_parts):
    """Models that are not ours, patched in memory by a run or not, with a clone's patches or their own."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    plain = comfy.sd.load_diffusion_model(path)
    one, other = with_lora(plain, lora, 0.7), with_lora(plain, forms("lora"), 1.0)
    wanted = [read(core_save(model))[0] for model in (plain, one, other)]
    for loaded in (None, plain, one, other):
        comfy.model_management.unload_all_models()
        if loaded is not None:
            run(loaded, steps=1)
        for model, tensors in zip((plain, one, other), wanted, strict=True):
            assert_same_tensors(read(save(model))[0], tensors)


def test_models_of_ours_with_other_patches_attached(checkpoint, tmp_path):
    path = checkpoint("flux", **SMALL)
    plain = load_diffusion_model(path)
    one, other = with_lora(plain, everywhere(path, tmp_path), 0.7), with_lora(plain, forms("lora"), 1.0)
    wanted = [open(save(model), "rb").read() for model in (plain, one, other)]  # noqa: SIM115
    assert_same_tensors(cast(read(save(plain))[0], torch.float32), cast(read(core_save(plain))[0], torch.float32))
    for loaded in (plain, one, other):
        before = run(loaded)
        for model, data in zip((plain, one, other), wanted, strict=True):
            assert open(save(model), "rb").read() == data  # noqa: SIM115
        assert_same(run(loaded), before)


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_fp8_without_scales(weight_dtype, checkpoint, tmp_path):
    """The loader's choice of a smaller dtype is kept, and rounded as for the run."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    options = {"dtype": getattr(torch, f"float8_{weight_dtype[4:]}")}
    core = with_lora(comfy.sd.load_diffusion_model(path, model_options=options), lora)
    ours = with_lora(load_diffusion_model(path, weight_dtype), lora)
    assert_same_tensors(read(save(ours))[0], read(core_save(core))[0])


@pytest.mark.parametrize(
    ("kind", "options"), [("wan", {"layers": 1}), ("z_image", {"layers": 1}), ("sd15_unet", {"mult": (1,)})]
)
def test_other_architectures(kind, options, checkpoint, tmp_path, small_parts):
    path = checkpoint(kind, **options, dtype=torch.float32)
    lora = everywhere(path, tmp_path)
    core, ours = with_lora(comfy.sd.load_diffusion_model(path), lora), with_lora(load_diffusion_model(path), lora)
    assert_same_tensors(read(save(ours))[0], read(core_save(core))[0])


def test_resized_weights(checkpoint):
    path = checkpoint("flux", **SMALL, dtype=torch.float32)
    files = []
    for load, saver in ((comfy.sd.load_diffusion_model, core_save), (load_diffusion_model, save)):
        model = load(path).clone()
        patch = ("diff", (numbers(128, 128, scale=0.1), {"pad_weight": True}))
        model.add_patches({"diffusion_model.img_in.weight": patch}, 0.5)
        comfy.model_management.load_models_gpu([model])
        files.append(read(saver(model))[0])
    assert files[1][f"{PREFIX}img_in.weight"].shape == (128, 128)
    assert_same_tensors(files[1], files[0])


# --- quantised --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [name for name in SAVE_DTYPES if name in QUANTISATIONS])
def test_quantised(dtype, checkpoint, tmp_path, small_parts):
    """The core's own quantisation of its own patched weights, in the blocks; it loads here and there, and runs."""
    path = checkpoint("flux", **SMALL)
    lora = everywhere(path, tmp_path)
    core, ours = with_lora(comfy.sd.load_diffusion_model(path), lora), with_lora(load_diffusion_model(path), lora)
    wanted, _ = read(core_save(core))
    saved = save(ours, dtype)
    got, _ = read(saved)
    algorithm = QUANTISATIONS[dtype]
    layers = [key.removesuffix(".comfy_quant") for key in got if key.endswith(".comfy_quant")]
    assert len(layers) == 13 and all("_blocks.0." in layer for layer in layers)
    for layer in layers:
        reference = QuantizedTensor.from_float(
            wanted.pop(f"{layer}.weight"), QUANT_ALGOS[algorithm]["comfy_tensor_layout"], scale="recalculate"
        )
        conf = got.pop(f"{layer}.comfy_quant").numpy().tobytes()
        assert conf == b'{"format": "%s"}' % algorithm.encode()
        pieces = {f"{layer}.{name}": got.pop(f"{layer}.{name}") for name in ("weight", "weight_scale")}
        assert_same_tensors(pieces, reference.state_dict(f"{layer}.weight"))
    assert_same_tensors(got, cast(wanted, torch.bfloat16))
    before = run(core)
    again = comfy.sd.load_diffusion_model(saved), load_diffusion_model(saved, policy=budget(core, 0.1))
    results = [run(model) for model in again]
    assert_same(*results)
    assert 0 < (results[0] - before).abs().mean() < 0.2 * before.abs().mean()
    # LoRAs on it, saved in its own quantisation and in another.
    patched = [with_lora(model, forms("lora"), 0.5) for model in again]
    wanted, _ = read(core_save(patched[0]))
    # Of what is not quantised the core makes fp32 copies on a CPU, of Linear layers in its loader also for us.
    assert_same_tensors(like(read(save(again[1]))[0], got := read(saved)[0]), got)
    assert_same_tensors(like(read(save(patched[1]))[0], wanted), wanted)
    assert_same_tensors(read(save(patched[0]))[0], wanted)
    plain, _ = read(save(patched[1], "bf16"))
    assert set(plain) == {key for key in wanted if not key.endswith((".comfy_quant", ".weight_scale"))}
    comfy.model_management.unload_all_models()
    for layer in layers:
        key = f"diffusion_model.{layer.removeprefix(PREFIX)}.weight"
        weight = patched[0].patch_weight_to_device(key, return_weight=True)
        assert torch.equal(plain[f"{layer}.weight"], weight.dequantize().bfloat16())


@pytest.mark.parametrize("algorithm", [name for name in ("float8_e5m2", "mxfp8", "nvfp4") if name in QUANT_ALGOS])
def test_other_quantisations_are_kept(algorithm, checkpoint, tmp_path):
    """Files that others have quantised: unpatched as they are, patched as the core quantises them again."""
    tensors, layer = dict(DiskMap(checkpoint("flux", **SMALL)).state_dict()), QKV[16:]
    quantised = QuantizedTensor.from_float(
        tensors.pop(f"{layer}.weight").float(), QUANT_ALGOS[algorithm]["comfy_tensor_layout"], scale="recalculate"
    )
    tensors |= quantised.state_dict(f"{layer}.weight")
    conf = b'{"format": "%s"}' % algorithm.encode()
    tensors[f"{layer}.comfy_quant"] = torch.tensor(list(conf), dtype=torch.uint8)
    path = str(tmp_path / "quantised.safetensors")
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    core, ours = comfy.sd.load_diffusion_model(path), load_diffusion_model(path)
    got = read(save(ours))[0]
    wanted = {f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}
    pieces = [key for key in got if key.startswith(f"{PREFIX}{layer}.")]
    assert len(pieces) == len(quantised.state_dict("x")) + 2  # the bias, and the name of the format
    for key in pieces:
        stored = wanted[key].to(got[key].dtype)  # the bias has been made fp32 by the core
        assert torch.equal(got[key].reshape(-1).view(torch.uint8), stored.reshape(-1).view(torch.uint8)), key
    files = [read(saver(with_lora(model, forms("lora"))))[0] for model, saver in ((core, core_save), (ours, save))]
    assert_same_tensors(like(files[1], files[0]), files[0])


def test_a_matrix_of_zeros_is_quantised(checkpoint):
    path = checkpoint("flux", **SMALL)
    model = load_diffusion_model(path).clone()
    model.add_patches({f"{QKV}.weight": ("set", (torch.zeros(384, 128),))})
    got, _ = read(save(model, "fp8_e4m3fn scaled"))
    key = f"{PREFIX}{QKV[16:]}.weight"
    assert bool((got[key].float() == 0).all()) and torch.isfinite(got[f"{key}_scale"])


def test_the_cores_quantised_models(checkpoint, tmp_path):
    """While another clone's patches are in the core's memory."""
    plain = comfy.sd.load_diffusion_model(save(load_diffusion_model(checkpoint("flux", **SMALL)), "fp8_e4m3fn scaled"))
    one, other = with_lora(plain, forms("lora"), 0.7), with_lora(plain, forms("loha"), 1.0)
    wanted = [read(core_save(model))[0] for model in (plain, one, other)]
    for loaded in (plain, one, other):
        run(loaded, steps=1)
        for model, tensors in zip((plain, one, other), wanted, strict=True):
            assert_same_tensors(read(save(model))[0], tensors)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoint(checkpoint, tmp_path, small_parts):
    """Model, text encoder and VAE, the first two with LoRAs; what the core's node writes, and it loads."""
    path = checkpoint("sd15")
    stem = "lora_te_" + TEXT.replace(".", "_")
    lora = {
        f"{stem}.lora_up.weight": numbers(768, 4, scale=0.2),
        f"{stem}.lora_down.weight": numbers(4, 768),
        "diffusion_model.input_blocks.1.0.in_layers.2.lora_up.weight": numbers(320, 4, 1, 1, scale=0.1),
        "diffusion_model.input_blocks.1.0.in_layers.2.lora_down.weight": numbers(4, 320, 3, 3),
    }
    core = comfy.sd.load_checkpoint_guess_config(path)[:3]
    ours = load_checkpoint(path)[:3]
    core, ours = ((*comfy.sd.load_lora_for_models(*three[:2], lora, 0.8, 0.6), three[2]) for three in (core, ours))
    wanted, core_metadata = read(core_save(core[0], clip=core[1], vae=core[2]))
    saved = save(ours[0], clip=ours[1], vae=ours[2])
    got, metadata = read(saved)
    assert metadata == core_metadata
    for key in wanted:  # the core keeps fp32 copies of fp16 files on a CPU
        assert torch.equal(got[key], wanted[key].to(got[key].dtype)), key
    assert set(got) == set(wanted) and {t.dtype for t in got.values() if t.dtype.is_floating_point} == {torch.float16}
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(saved)[:3]
    loaded = [
        (key, value)
        for part in (model.model.diffusion_model, clip.cond_stage_model, vae.first_stage_model)
        for key, value in part.state_dict().items()
    ]
    source = [
        (key, value)
        for part in (ours[0].model.diffusion_model, ours[1].cond_stage_model, ours[2].first_stage_model)
        for key, value in part.state_dict().items()
    ]
    unlike = [
        key
        for (key, value), (_, before) in zip(loaded, source, strict=True)
        if not torch.equal(value, before.to(value)) and "text_projection" not in key  # no file of SD 1.5 has that
    ]
    assert unlike == ["input_blocks.1.0.in_layers.2.weight", f"clip_l.transformer.{TEXT}.weight"]
    latent = sampling.latent(4, 32, 32)
    assert_same(sampling.vae_decode(vae, latent), sampling.vae_decode(core[2], latent))


def test_checkpoint_with_clip_vision(checkpoint):
    with checkpoints.small_clip_vision():
        path = checkpoint("unclip")
        core = comfy.sd.load_checkpoint_guess_config(path, output_clipvision=True)
        ours = load_checkpoint(path)
        clip = comfy.sd.load_clip([checkpoint("clip_l")])
        vae = core_vae(checkpoint("sd_vae"))
        saved = save(ours[0], clip=clip, vae=vae, clip_vision=ours[3], dtype="bf16")
        got, _ = read(saved)
        vision = {key: tensor for key, tensor in core[3].get_sd().items() if tensor.dtype.is_floating_point}
        assert len(vision) > 300
        for key, tensor in vision.items():
            assert torch.equal(got[f"embedder.model.visual.{key}"], tensor.bfloat16())


def test_text_encoders_that_the_core_joins():
    """SD 2's and SDXL's query, key and value are one tensor in a checkpoint."""
    from comfy.diffusers_convert import convert_text_enc_state_dict_v20

    stem = "clip_g.transformer.text_model.encoder.layers.0.self_attn"
    tensors = {f"{stem}.{name}_proj.weight": numbers(8, 8, seed=place) for place, name in enumerate("qkv")}
    tensors |= {f"{stem}.{name}_proj.bias": numbers(8, seed=place) for place, name in enumerate("qkv")}
    tensors["clip_g.transformer.text_projection.weight"] = numbers(6, 8)
    wanted = convert_text_enc_state_dict_v20(dict(tensors), "clip_g")
    with deferred.Assembling() as assembling:
        lazy = {k: deferred.Deferred.of(deferred.Stored(t), tuple(t.shape), t.dtype) for k, t in tensors.items()}
        got = convert_text_enc_state_dict_v20(lazy, "clip_g")
        got = {key: assembling.resolve(tensor) for key, tensor in got.items()}
    assert len(wanted) == 3
    assert_same_tensors({key: deferred.whole(tensor) for key, tensor in got.items()}, wanted)


# --- names, metadata, errors ------------------------------------------------------------------------------------------


def test_workflow_in_the_metadata(checkpoint, monkeypatch):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    hidden = types.SimpleNamespace(prompt={"1": {"class_type": "X"}}, extra_pnginfo={"workflow": {"nodes": []}})
    monkeypatch.setattr(SpillwaySaveDiffusionModel, "hidden", hidden)
    _, metadata = read(save(model))
    assert metadata["prompt"] == '{"1": {"class_type": "X"}}' and metadata["workflow"] == '{"nodes": []}'
    monkeypatch.setattr(args, "disable_metadata", True)
    assert not read(save(model))[1]


@pytest.mark.parametrize("prefix", ["../evil", "a/../../evil", "/evil", "", " ", ".", "a/..", "..", "a\0b"])
def test_names_outside_the_output_folder(prefix, checkpoint, tmp_path):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    before = sorted(tmp_path.parent.rglob("*evil*"))
    with pytest.raises(ValueError, match=r"outside the output folder|names no file"):
        save(model, name=prefix)
    assert sorted(tmp_path.parent.rglob("*evil*")) == before and not os.path.exists("/evil_00001_.safetensors")


def test_a_subfolder_is_made(checkpoint, tmp_path):
    saved = save(load_diffusion_model(checkpoint("flux", **SMALL)), name="a/b/c%year%")
    assert os.path.dirname(saved) == str(tmp_path / "a" / "b") and os.path.basename(saved).startswith("c20")


def test_the_report(checkpoint):
    out = SpillwaySaveDiffusionModel.execute(
        model=load_diffusion_model(checkpoint("flux", **SMALL)), filename_prefix="x", dtype="as loaded"
    )
    size = os.path.getsize(out.args[0])
    (words,) = out.ui.as_dict()["text"]
    assert words.startswith(f"x_00001_.safetensors: {size:,} bytes in ") and "MB/s" in words


def test_the_stop_button(checkpoint, tmp_path):
    model = load_diffusion_model(checkpoint("flux", **SMALL))
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        save(model)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_progress(checkpoint, monkeypatch):
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    saved = save(load_diffusion_model(checkpoint("flux", **SMALL)))
    total = sum(spec.nbytes for spec in (DiskMap(saved).spec(key) for key in DiskMap(saved).keys()))  # noqa: SIM118
    assert seen[0] == (0, total) and seen[-1] == (total, total)


def test_numbers_too_large_for_fp16(checkpoint):
    model = load_diffusion_model(checkpoint("flux", **SMALL)).clone()
    model.add_patches({f"{QKV}.weight": ("set", (torch.full((384, 128), 1e6),))})
    with pytest.raises(SaveError, match=r"qkv\.weight' holds numbers up to 1e\+06; fp16 ends at 65504"):
        save(model, "fp16")
    with pytest.raises(ValueError, match="dtype 'fp9' is not one of as loaded, bf16"):
        save(model, "fp9")


def test_a_weight_that_the_file_lacks(checkpoint):
    lacking = "text_model.final_layer_norm.weight"
    clip = load_clip([checkpoint("clip_l", drop=(lacking,))])
    model, vae = load_diffusion_model(checkpoint("flux", **SMALL)), load_vae(checkpoint("flux_vae"))
    with pytest.raises(SaveError, match=rf"{lacking}' has no data: the file .* lacks it"):
        save(model, clip=clip, vae=vae)
