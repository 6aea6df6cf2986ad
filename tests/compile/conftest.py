"""Fixtures of the tests of compiled blocks."""

import functools

import pytest
import torch
import torch._dynamo
import torch._dynamo.utils

from kit.compiled_net import compiled
from spillway.ops.compile import block_compiler


@pytest.fixture(autouse=True)
def as_when_sampling():
    """Nothing is compiled yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block_compiler._recent.clear()
    block_compiler._functions.clear()  # a model of an earlier test may be alive until the collector runs
    with torch.inference_mode():
        yield


@pytest.fixture
def make(tmp_path):
    """`compiled` with a file of its own."""
    return functools.partial(compiled, tmp_path / "net.safetensors")
