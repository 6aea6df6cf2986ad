"""Fixtures of the tests of INT8 Lazy Torch Compile."""

import pytest
import torch
import torch._dynamo
import torch._dynamo.utils

from kit.comfyui import checkpoints
from kit.comfyui.pairs import SMALL
from spillway.ops.compile import block_compiler


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block_compiler._recent.clear()


@pytest.fixture
def lora_path(checkpoint, models_dir):
    return checkpoints.lora(str(models_dir / "loras" / "compile-quantised.safetensors"), checkpoint("flux", **SMALL))
