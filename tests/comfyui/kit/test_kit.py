"""The kit itself, on ComfyUI alone: its files load in ComfyUI's own loaders, and its runs repeat bit for bit."""

import logging

import comfy.model_management
import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints, sampling

ARCHES = ("flux", "wan", "lumina2", "z_image", "sd15_unet")
TEXT = "a small red house by the sea"


@pytest.fixture(autouse=True)
def nothing_missing(caplog):
    """ComfyUI only logs what a file lacks, and only in passing what it has too much of."""
    caplog.set_level(logging.DEBUG)
    yield
    words = "unexpected", "Leftover", "left over keys in diffusion"
    said = [(record.levelno, record.getMessage()) for record in caplog.get_records("call")]
    assert not [text for level, text in said if level >= logging.WARNING or any(word in text for word in words)]


@pytest.mark.parametrize("arch", ARCHES)
def test_comfyui_loads_our_diffusion_models_and_repeats_itself(arch, checkpoint):
    model = comfy.sd.load_diffusion_model(checkpoint(arch))
    assert sampling.arch_of(model) == arch.removesuffix("_unet")
    first = sampling.sample(model, steps=2)
    assert first.isfinite().all() and first.std() > 0.1
    assert torch.equal(first, sampling.sample(model, steps=2))
    assert not torch.equal(first, sampling.sample(model, steps=2, seed=1))

    other = comfy.sd.load_diffusion_model(checkpoint(arch, seed=1))
    assert not torch.equal(first, sampling.sample(other, steps=2))


def test_a_second_load_gives_the_same_bits(checkpoint):
    """Also a second load of the file, whose buffers lie elsewhere, gives the same bits."""
    runs = [sampling.sample(comfy.sd.load_diffusion_model(checkpoint("flux"))) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize(("arch", "sizes"), [("flux", {"depth": 1, "depth_single": 1}), ("z_image", {"layers": 1})])
def test_every_weight_counts_in_the_latents(arch, sizes, checkpoint):
    model = comfy.sd.load_diffusion_model(checkpoint(arch, **sizes))
    plain = sampling.sample(model, steps=1, width=32, height=32)
    silent = []
    for name, weight in model.model.diffusion_model.named_parameters():
        kept = weight.clone()
        weight.mul_(0.5)
        if torch.equal(plain, sampling.sample(model, steps=1, width=32, height=32)):
            silent.append(name)
        weight.copy_(kept)
    assert not silent


def test_comfyui_loads_all_parts_of_our_checkpoint(checkpoint):
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(checkpoint("sd15"))
    cond, pooled = sampling.text_encode(clip, TEXT)
    assert cond.shape == (1, 77, 768) and cond.isfinite().all() and pooled.isfinite().all()
    negative, _ = sampling.text_encode(clip, "")
    assert not torch.equal(cond, negative)
    latents = sampling.sample(model, cond=([[cond, {}]], [[negative, {}]]))
    picture = sampling.vae_decode(vae, latents / latents.std())
    assert picture.shape == (1, 64, 64, 3) and picture.isfinite().all() and picture.std() > 0.05
    assert torch.equal(picture, sampling.vae_decode(vae, latents / latents.std()))
    again = sampling.vae_encode(vae, picture)
    assert again.shape == latents.shape and again.isfinite().all() and again.std() > 0.01


@pytest.mark.parametrize(
    ("kind", "clip_type", "options", "width"),
    [
        ("clip_l", "STABLE_DIFFUSION", dict, 768),
        ("t5_base", "STABLE_AUDIO", dict, 768),
        ("t5xxl_small", "LTXV", lambda: checkpoints.T5XXL_SMALL_OPTIONS, 64),
        ("qwen3_06b", "STABLE_DIFFUSION", lambda: checkpoints.small_options(qwen_layers=2), 1024),
    ],
)
def test_comfyui_loads_our_text_encoders(kind, clip_type, options, width, checkpoint):
    clip = comfy.sd.load_clip([checkpoint(kind)], clip_type=comfy.sd.CLIPType[clip_type], model_options=options())
    cond, _ = sampling.text_encode(clip, TEXT)
    assert cond.shape[-1] == width and cond.isfinite().all()
    assert torch.equal(cond, sampling.text_encode(clip, TEXT)[0])
    other, _ = sampling.text_encode(clip, "quite another thing altogether")
    assert cond.shape != other.shape or not torch.equal(cond, other)


def test_comfyui_loads_two_of_our_text_encoders_as_one(checkpoint):
    paths = [checkpoint("clip_l", layers=2), checkpoint("t5xxl_small")]
    options = {**checkpoints.small_options(clip_layers=2), **checkpoints.T5XXL_SMALL_OPTIONS}
    clip = comfy.sd.load_clip(paths, clip_type=comfy.sd.CLIPType.FLUX, model_options=options)
    cond, pooled = sampling.text_encode(clip, TEXT)
    assert cond.isfinite().all() and pooled.shape == (1, 768)


@pytest.mark.parametrize(("kind", "channels"), [("sd_vae", 4), ("flux_vae", 16), ("wan_vae", 16)])
def test_comfyui_loads_our_vaes(kind, channels, checkpoint):
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(checkpoint(kind)))
    vae.throw_exception_if_invalid()
    encoded = sampling.vae_encode(vae, sampling.image(batch=5 if kind == "wan_vae" else 1))
    assert encoded.shape == ((1, 16, 2, 8, 8) if kind == "wan_vae" else (1, channels, 8, 8))
    assert encoded.isfinite().all() and encoded.std() > 0.01
    picture = sampling.vae_decode(vae, encoded / encoded.std())
    assert picture.isfinite().all() and picture.std() > 0.01
    assert torch.equal(picture, sampling.vae_decode(vae, encoded / encoded.std()))


def test_comfyui_loads_our_loras(checkpoint, models_dir):
    base = checkpoint("flux")
    path = checkpoints.lora(models_dir / "loras" / "kit.safetensors", base, match="double_blocks")
    model = comfy.sd.load_diffusion_model(base)
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(path), 1.0, 0.0)
    plain = sampling.sample(model)
    changed = sampling.sample(with_lora)
    assert changed.isfinite().all() and not torch.equal(plain, changed)
    assert torch.equal(plain, sampling.sample(model))


def _load_patch(models_dir, kind, **options):
    from comfy_extras.nodes_model_patch import ModelPatchLoader

    path = models_dir / "model_patches" / f"{kind}.safetensors"
    getattr(checkpoints, kind)(path, **options)
    return ModelPatchLoader().load_model_patch(path.name)[0]


def test_comfyui_loads_our_anima_patch(models_dir):
    pytest.importorskip("comfy.ldm.anima.lllite")
    assert type(_load_patch(models_dir, "patch_anima_lllite").model).__name__ == "AnimaLLLite"


def test_comfyui_loads_our_model_patches(models_dir):
    assert type(_load_patch(models_dir, "patch_uso").model).__name__ == "SigLIPMultiFeatProjModel"
    with checkpoints.small_patches(qwen_dim=128, qwen_layers=4, z_dim=256):
        qwen = _load_patch(models_dir, "patch_qwen_diffsynth", dim=128, layers=4).model
        assert len(qwen.controlnet_blocks) == 4 and qwen.img_in.weight.shape == (128, 64)
        late = _load_patch(models_dir, "patch_z_image_control", dim=256, layers=3).model
        assert late.refiner_control and late.additional_in_dim == 17


def test_our_z_image_control_changes_the_latents(checkpoint, models_dir):
    from comfy_extras.nodes_model_patch import ZImageFunControlnet

    with checkpoints.small_patches(z_dim=256):
        patch = _load_patch(models_dir, "patch_z_image_control", dim=256)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(checkpoint("flux_vae")))
    model = comfy.sd.load_diffusion_model(checkpoint("z_image"))
    (patched,) = ZImageFunControlnet().diffsynth_controlnet(model, patch, vae, image=sampling.image())
    plain, changed = sampling.sample(model), sampling.sample(patched)
    assert changed.isfinite().all() and not torch.equal(plain, changed)


def test_our_wan_uni3c_changes_the_latents(checkpoint, models_dir):
    pytest.importorskip("comfy.ldm.wan.uni3c")
    from comfy_extras.nodes_model_patch import WanUni3CControlnetApply

    patch = _load_patch(models_dir, "patch_wan_uni3c")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(checkpoint("wan_vae")))
    model = comfy.sd.load_diffusion_model(checkpoint("wan"))
    (patched,) = WanUni3CControlnetApply().apply_patch(model, patch, vae, sampling.image(batch=5), 1.0, 0.0, 1.0)
    plain, changed = sampling.sample(model), sampling.sample(patched)
    assert changed.isfinite().all() and not torch.equal(plain, changed)


def test_an_interrupt_stops_comfyui(checkpoint):
    model = comfy.sd.load_diffusion_model(checkpoint("wan"))
    steps = []

    def stop(step, *_):
        steps.append(step)
        if step == 1:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampling.sample(model, callback=stop)
    assert steps == [0, 1]
    assert not comfy.model_management.processing_interrupted()


WRONG = [
    ("truncated", {}),
    ("not_a_model", {"kind": "tensors"}),
    ("not_a_model", {"kind": "none"}),
    ("not_a_model", {"kind": "empty"}),
    ("not_a_model", {"kind": "text"}),
    ("not_a_model", {"kind": "html"}),
    *(
        ("wrong_header", {"kind": kind})
        for kind in ("length", "huge", "json", "not_a_dict", "offsets", "overlap", "size", "dtype", "negative", "short")
    ),
]


@pytest.mark.parametrize(("kind", "options"), WRONG)
def test_comfyui_refuses_our_wrong_files(kind, options, tmp_path, caplog):
    path = getattr(checkpoints, kind)(tmp_path / "wrong.safetensors", **options)
    try:
        with pytest.raises(Exception, match=r"."):
            comfy.sd.load_diffusion_model(path)
    finally:
        caplog.clear()


def test_comfyui_logs_a_missing_key(tmp_path, caplog):
    key = "double_blocks.1.img_mlp.2.weight"
    path = checkpoints.missing_key(tmp_path / "gap.safetensors", key)
    assert key not in checkpoints.read_header(path)
    comfy.sd.load_diffusion_model(path)
    said = caplog.text
    caplog.clear()
    assert key in said


def test_the_sizes_of_a_file_are_free(checkpoint):
    header = checkpoints.read_header(checkpoint("flux", hidden=384, depth=1, depth_single=3, dtype=torch.float16))
    assert header["img_in.weight"]["shape"] == [384, 64] and header["img_in.weight"]["dtype"] == "F16"
    assert "single_blocks.2.linear1.weight" in header and "double_blocks.1.img_mod.lin.weight" not in header


def test_tensors_larger_than_the_pool_of_numbers_wrap_without_a_seam(tmp_path):
    """A tensor larger than the pool of random numbers wraps around without a seam."""
    size = checkpoints.Noise.SIZE
    path = checkpoints.write(tmp_path / "big.safetensors", {"x": ((5, 1_000_003), torch.float32, 1.0, 2.0)})
    tensor = comfy.utils.load_torch_file(path)["x"].flatten()
    assert abs(tensor.mean() - 1) < 0.01 and abs(tensor.std() - 2) < 0.01
    assert torch.equal(tensor[:100], tensor[size : size + 100])
