"""Building modules without memory for their parameters."""

import sys
import threading

import psutil
import pytest
import torch

from spillway.ops.skip_init import skip_model_initialization

BUILDERS = {
    "linear": lambda: torch.nn.Linear(8, 8),
    "conv": lambda: torch.nn.Conv2d(4, 4, 3),
    "transposed conv": lambda: torch.nn.ConvTranspose1d(4, 4, 3),
    "embedding": lambda: torch.nn.Embedding(10, 4, padding_idx=0),
    "layer norm": lambda: torch.nn.LayerNorm(8),
    "group norm": lambda: torch.nn.GroupNorm(2, 8),
    "attention": lambda: torch.nn.MultiheadAttention(8, 2),
    "batch norm": lambda: torch.nn.BatchNorm2d(4),
    "own parameter": lambda: torch.nn.ParameterList([torch.randn(3, 3)]),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_parameters_are_on_meta_with_the_shapes_and_dtypes_of_a_plain_build(build):
    real = build()
    with skip_model_initialization():
        module = build()
    assert all(isinstance(p, torch.nn.Parameter) and p.is_meta for p in module.parameters())
    described = {name: (p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters()}
    assert described == {name: (p.shape, p.dtype, p.requires_grad) for name, p in real.named_parameters()}


def test_buffers_are_real_and_hold_their_values():
    with skip_model_initialization():
        module = torch.nn.BatchNorm2d(4)
        module.register_buffer("table", torch.arange(5) ** 2)
    assert torch.equal(module.running_var, torch.ones(4))
    assert module.table.tolist() == [0, 1, 4, 9, 16]


def test_parameters_below_the_limit_keep_their_initial_values():
    with skip_model_initialization(keep_below=100):
        norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(5, 5)
    assert torch.equal(norm.weight, torch.ones(8))
    assert linear.weight.is_meta  # 100 bytes
    assert not linear.bias.is_meta


def test_a_dtype_asked_for_is_kept():
    with skip_model_initialization():
        assert torch.nn.Linear(4, 4, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_weights_loaded_inside_the_block_are_real():
    weights = {"weight": torch.randn(4, 4), "bias": torch.randn(4)}
    with skip_model_initialization():
        module = torch.nn.Linear(4, 4)
        module.load_state_dict(weights, assign=True)
    assert torch.equal(module.weight, weights["weight"])


def test_other_threads_build_real_modules():
    made = []
    with skip_model_initialization():
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(4, 4)))
        thread.start()
        thread.join()
        assert torch.nn.Linear(4, 4).weight.is_meta
    assert not made[0].weight.is_meta


def test_a_block_inside_a_block_does_not_end_it():
    with skip_model_initialization():
        with skip_model_initialization():
            pass
        assert torch.nn.Linear(2, 2).weight.is_meta


def test_modules_are_real_again_after_the_block_whatever_ends_it():
    make, load = torch.nn.Parameter.__new__, torch.nn.Module.load_state_dict
    with pytest.raises(KeyboardInterrupt), skip_model_initialization():
        raise KeyboardInterrupt
    assert torch.nn.Parameter.__new__ is make and torch.nn.Module.load_state_dict is load
    assert not torch.nn.Linear(2, 2).weight.is_meta
    torch.nn.Linear(2, 2)(torch.ones(2)).sum().backward()


@pytest.mark.skipif(sys.platform == "darwin", reason="the resident size is compressed there")
def test_building_a_large_model_takes_no_memory():
    process = psutil.Process()
    before = process.memory_info().rss
    with skip_model_initialization():
        module = torch.nn.ModuleList(torch.nn.Linear(4096, 4096) for _ in range(40))
    grown = process.memory_info().rss - before
    assert sum(p.numel() for p in module.parameters()) * 4 > 2.6e9
    assert grown < 30e6
