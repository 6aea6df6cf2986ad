"""Numbers of quantised blocks beside the `gguf` package, which is the format's reference in Python."""

import gguf
import numpy
import pytest
import torch
from gguf import quants

from kit.gguf_files import random_blocks
from spillway.ops.files.safetensors_header import SourceError
from spillway.ops.gguf import dequantise
from spillway.ops.gguf.types import IDS, TYPES

QUANTISED = [kind.name for kind in TYPES.values() if kind.dtype is None]


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
def test_blocks_are_as_large_as_the_reference_says(kind):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]] == (kind.numbers, kind.nbytes)
    assert gguf.GGMLQuantizationType[kind.name] == IDS[kind.name]


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_bytes_give_the_bits_of_the_reference(kind):
    """NaN stays NaN. Which of its many bits it has is the processor's choice."""
    raw = numpy.random.default_rng(1).integers(0, 256, (500, TYPES[IDS[kind]].nbytes), dtype=numpy.uint8)
    wanted = quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    got = dequantise.function_for(kind)(torch.from_numpy(raw), torch.float32).numpy()
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    same = (got.view(numpy.int32) == wanted.view(numpy.int32)) | (numpy.isnan(got) & numpy.isnan(wanted))
    assert same.all()


@pytest.mark.parametrize("kind", dequantise.IN_TORCH)
def test_blocks_of_tests_have_numbers_of_a_weight(kind):
    numbers = dequantise.IN_TORCH[kind](random_blocks(kind, 256 * 256), torch.float32)
    assert numbers.isfinite().all() and 0.01 < numbers.std() < 0.04


def test_a_type_that_needs_the_package_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    dequantise.function_for.cache_clear()
    with pytest.raises(SourceError, match=r"IQ3_S need the package 'gguf': install it"):
        dequantise.function_for("IQ3_S")
