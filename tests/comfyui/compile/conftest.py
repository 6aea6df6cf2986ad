"""Fixtures of the tests of INT8 Lazy Torch Compile. They import ComfyUI when they are used: it may be missing."""

import pytest


@pytest.fixture(autouse=True)
def nothing_compiled():
    import torch._dynamo
    import torch._dynamo.utils

    from spillway.ops.compile import block_compiler

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block_compiler._recent.clear()
    block_compiler._functions.clear()  # a model of an earlier test may be alive until the collector runs


@pytest.fixture
def lora_path(checkpoint, models_dir):
    from kit.comfyui import checkpoints
    from kit.comfyui.pairs import SMALL

    return checkpoints.lora(str(models_dir / "loras" / "compile-quantised.safetensors"), checkpoint("flux", **SMALL))
