"""What only fresh processes show: the same bits every time, and what hooks take of memory."""

from pathlib import Path

import comfy.sd
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.fresh_process import LINUX, run_with_lora
from kit.comfyui.pairs import SMALL
from spillway.ops.ram import allocator


@LINUX
def test_every_process_gives_the_same_bits_at_any_residency(checkpoint, tmp_path):
    """FP8 weights with a LoRA: rounded at random, with numbers that depend on the weight's name alone."""
    path = checkpoint("flux", **SMALL)
    lora = checkpoints.lora(tmp_path / "lora.safetensors", path)
    size = comfy.sd.load_diffusion_model(path, model_options={"dtype": torch.float8_e4m3fn}).model_size()
    options = {"dtype": "fp8_e4m3fn", "lora": 0.7, "steps": 3}
    runs = [{"classic": True}, {"budget": 1 << 30}, {"budget": size // 3}, {"budget": 0, "pinned": 1 << 30}]
    digests = [run_with_lora(path, lora, **options, **more)["digest"] for more in runs]
    assert len(set(digests)) == 1


@LINUX
@pytest.mark.parametrize("depth", [4, pytest.param(24, marks=pytest.mark.slow)])
def test_hooks_take_one_copy_of_the_weights(depth, checkpoint, tmp_path):
    """Within a twentieth of the same run without hooks, and the LoRA. A second copy would double it."""
    path = checkpoint("flux", hidden=512, depth=depth, depth_single=depth)  # beside the temporary memory of one weight
    lora = checkpoints.lora(tmp_path / "lora.safetensors", path, rank=16)
    size = 2 * Path(path).stat().st_size  # on a CPU, bf16 is computed in fp32
    options = {"dtype": "default", "steps": 2, "budget": 1 << 40}
    plain = run_with_lora(path, lora, **options)
    hooked = run_with_lora(path, lora, **options, hook=0.8)
    assert hooked["digest"] != plain["digest"]
    assert size < plain["grown"] < 1.3 * size  # the weights, above all
    # Of a small model the temporary memory is more than a twentieth: what glibc keeps at the end of the heap while
    # a CPU samples. The weights lie apart from that heap, so none of them uses it. A second copy would be 190 MB.
    more = max(plain["grown"] / 20, 2 * allocator.COMPUTING_THRESHOLD)
    assert hooked["grown"] <= plain["grown"] + more + Path(lora).stat().st_size
