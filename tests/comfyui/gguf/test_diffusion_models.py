"""Diffusion models from GGUF files beside ComfyUI's own, with the same weights in bf16."""

import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints, saving
from kit.comfyui.pairs import assert_same, budget, counters, run
from kit.gguf_files import quantised_copy, random_blocks, write_gguf
from spillway.ops.gather import aligned
from spillway.ops.gguf.dequantise import IN_TORCH
from spillway.ops.gguf.weight import GgufWeight
from spillway.ops.parts.open_map import open_map
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

MODELS = {
    "flux": {"hidden": 256, "depth": 1, "depth_single": 1},
    "wan": {"dim": 256, "layers": 2},
    "z_image": {"dim": 256, "layers": 2, "context": 256},
    "lumina2": {"dim": 288, "layers": 2},
    "qwen_image": {"dim": 256, "layers": 1},
}


@pytest.fixture
def files(checkpoint, tmp_path):
    """`files("flux", "Q4_K")`: a GGUF file, and a safetensors file of the weights that it stands for.

    dtype: of the tensors that are not quantised, and so the one that the blocks stand for.
    """

    def make(model, kind, dtype=torch.bfloat16):
        tensors = comfy.utils.load_torch_file(checkpoint(model, **MODELS[model], dtype=dtype))
        written, stands_for = quantised_copy(tensors, kind, dtype=dtype)
        plain = checkpoints.write(tmp_path / f"{model}-{kind}.safetensors", stands_for)
        return write_gguf(tmp_path / f"{model}-{kind}.gguf", written), plain

    return make


@pytest.mark.parametrize(
    ("model", "kind", "dtype"),
    [
        ("flux", "Q4_K", torch.bfloat16),
        ("wan", "Q8_0", torch.bfloat16),
        ("wan", "Q3_K", torch.float16),  # its first layer lies in the file as it is, which says so
        ("z_image", "Q6_K", torch.bfloat16),
        ("lumina2", "Q5_0", torch.bfloat16),
        ("qwen_image", "IQ4_XS", torch.bfloat16),
    ],
)
def test_latents_are_those_of_the_dequantised_weights(model, kind, dtype, files):
    gguf, plain = files(model, kind, dtype)
    classic = comfy.sd.load_diffusion_model(plain)
    wanted = run(classic, steps=2)
    for fraction in (1.0, 0.5, 0.25, 0.0):
        ours = comfy_load.load_diffusion_model(gguf, policy=budget(classic, fraction))
        assert_same(run(ours, steps=2), wanted)
        assert any(isinstance(param.source, GgufWeight) for bundle in ours.dynamic.bundles for param in bundle.params)
        ours.detach()


def bytes_of_tensors(path):
    """What the tensors of a file take in a buffer, where each begins at a whole place."""
    source = open_map(path)
    return sum(aligned(source.spec(name).nbytes) for name in list(source.keys()))


def test_what_travels_is_what_the_file_holds(files):
    """At no budget each step streams the blocks, once: as many bytes as the file has for them."""
    gguf, _ = files("flux", "Q4_K")
    model = comfy_load.load_diffusion_model(gguf, policy=Policy(vram_bytes=0))
    run(model, steps=1)
    before = counters(model).bytes_streamed
    run(model, steps=1)
    order = model.dynamic.execution_order()
    in_file = sum(bundle.source_bytes for bundle in order)
    assert in_file == bytes_of_tensors(gguf)
    more = counters(model).bytes_streamed - before - in_file
    # A device brings the first bundles of a next step ahead, which does not come.
    assert 0 <= more <= sum(bundle.source_bytes for bundle in order[: model.policy.prefetch])
    assert in_file < 0.5 * model.model_size()


def test_a_lora_stays_beside_the_blocks(files, checkpoint):
    """As near to the exact weights as a merge into bf16, applied once, and as fast to bring as the blocks."""
    gguf, plain = files("flux", "Q4_K")
    lora = comfy.utils.load_torch_file(checkpoint("lora", base=plain))
    patched = comfy.sd.load_lora_for_models(comfy.sd.load_diffusion_model(plain), None, lora, 0.8, 0)[0]
    ours = comfy_load.load_diffusion_model(gguf, policy=Policy(vram_bytes=0))
    without = run(ours, steps=2)
    ours = comfy.sd.load_lora_for_models(ours, None, lora, 0.8, 0)[0]
    got, wanted = run(ours, steps=2), run(patched, steps=2)
    assert float((got - wanted).norm() / (wanted - without).norm()) < (0.02 if ours.dynamic.backend.in_place else 0.03)
    branches = [param for bundle in ours.dynamic.bundles for param in bundle.params if getattr(param.final, "rank", 0)]
    assert branches and all(isinstance(param.final, GgufWeight) for param in branches)
    before = counters(ours)
    run(ours, steps=2)
    after = counters(ours)
    assert after.patched == before.patched
    assert_same(run(ours, steps=2), got)


def test_other_patches_are_merged_into_the_numbers(files):
    """They are no sum of low-rank products, so the weight leaves its blocks and is patched as ComfyUI does it."""
    gguf, plain = files("flux", "Q4_K")
    classic = comfy.sd.load_diffusion_model(plain)
    key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    shape = comfy.utils.get_attr(classic.model, key).shape
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02

    def patched(model):
        model = model.clone()
        assert model.add_patches({key: ("diff", (difference,))}, 0.7)
        return model

    wanted = run(patched(classic), steps=2)
    for fraction in (1.0, 0.0):
        ours = comfy_load.load_diffusion_model(gguf, policy=budget(classic, fraction))
        plainly = run(ours, steps=2)
        assert_same(run(patched(ours), steps=2), wanted)
        assert_same(run(ours, steps=2), plainly)


def test_an_original_shape_comes_back(checkpoint, tmp_path):
    """Kernels of a convolution lie in rows that blocks divide."""
    tensors = comfy.utils.load_torch_file(checkpoint("wan", **MODELS["wan"]))
    written, stands_for = quantised_copy(tensors, "Q8_0")
    name = "patch_embedding.weight"
    shape = tuple(tensors[name].shape)
    blocks = random_blocks("Q8_0", tensors[name].numel())
    written[name] = ("Q8_0", (tensors[name].numel() // 32, 32), blocks)
    stands_for[name] = IN_TORCH["Q8_0"](blocks, torch.float32).view(shape).to(torch.bfloat16)
    gguf = write_gguf(tmp_path / "wan.gguf", written, {f"comfy.gguf.orig_shape.{name}": list(shape)})
    classic = comfy.sd.load_diffusion_model(checkpoints.write(tmp_path / "wan.safetensors", stands_for))
    assert_same(run(comfy_load.load_diffusion_model(gguf), steps=1), run(classic, steps=1))


def test_int8_is_made_of_the_numbers(files):
    gguf, plain = files("flux", "Q8_0")
    ours, same = (comfy_load.load_diffusion_model(path, "int8") for path in (gguf, plain))
    assert_same(run(ours, steps=1), run(same, steps=1))


def test_fp8_is_refused_with_what_to_choose(files):
    gguf, _ = files("flux", "Q4_K")
    with pytest.raises(ValueError, match="stay in its blocks, so weight_dtype 'fp8_e4m3fn' means nothing here"):
        comfy_load.load_diffusion_model(gguf, "fp8_e4m3fn")


def test_a_model_is_saved_with_its_numbers(files):
    """As safetensors: nothing here writes blocks."""
    gguf, plain = files("flux", "Q4_K")
    ours = comfy_load.load_diffusion_model(gguf)
    again = comfy.sd.load_diffusion_model(saving.save(ours))
    assert_same(run(again, steps=1), run(comfy.sd.load_diffusion_model(plain), steps=1))
