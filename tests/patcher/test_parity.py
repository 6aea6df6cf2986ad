"""A dynamic model gives the bits of the plain one, whatever its weights are stored in and wherever they are kept."""

import functools

import pytest
import torch

from kit.nets import Blocks, Stack, budget, dynamic, plain, random_state, same
from kit.sim_device import SimDevice
from spillway.ops.files.source import StateDict

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES = [*FP8, torch.float16, torch.bfloat16, torch.float32]


def name(value):
    return str(value).removeprefix("torch.")


PAIRS = [(file, model) for file in DTYPES for model in DTYPES]
# Of the same width, of another, and with a cast.
SOME = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float8_e4m3fn, torch.bfloat16),
]
# When copies end makes no difference between dtypes of a size, so all pairs meet one such order, and the others with
# --slow.
ORDERS = [
    pytest.param(eager, *pair, marks=pytest.mark.slow if eager and pair not in SOME else (), id=f"{order}-{names}")
    for order, eager in (("deferred", False), ("eager", True), ("overtaking", "some"))
    for pair, names in ((pair, "-".join(map(name, pair))) for pair in PAIRS)
]
BUDGETS = [None, 1.0, 0.5, 0.25, 0.0]
PINS = {"no pins": 0.0, "half pinned": 0.5, "all pinned": 2.0}


@functools.cache
def case(build, file_dtype, dtype):
    """Source, plain output; made once for all budgets."""
    state = random_state(build(), file_dtype)
    reference = plain(build, state, dtype)
    with torch.no_grad():
        return StateDict(state), reference(reference.input())


def stack():
    return Stack(14, 48)


@pytest.mark.parametrize("fraction", BUDGETS)
@pytest.mark.parametrize("pins", PINS.values(), ids=PINS)
@pytest.mark.parametrize(("eager", "file_dtype", "dtype"), ORDERS)
def test_on_a_device_with_memory_of_its_own(file_dtype, dtype, eager, pins, fraction):
    source, expected = case(stack, file_dtype, dtype)
    model = dynamic(stack, source, dtype, device=SimDevice(eager=eager))
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction), pinned_bytes=budget(model, pins)))
    for _ in range(3):
        assert same(model(model.module.input()), expected)


@pytest.mark.parametrize("fraction", BUDGETS)
@pytest.mark.parametrize(("file_dtype", "dtype"), PAIRS, ids=name)
def test_on_the_cpu(file_dtype, dtype, fraction):
    source, expected = case(stack, file_dtype, dtype)
    model = dynamic(stack, source, dtype)
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction)))
    for _ in range(3):
        assert same(model(model.module.input()), expected)


@pytest.mark.parametrize("fraction", BUDGETS)
@pytest.mark.parametrize("device", [lambda: None, SimDevice], ids=["cpu", "device"])
@pytest.mark.parametrize(("file_dtype", "dtype"), SOME, ids=name)
def test_stock_layers_of_all_sizes(file_dtype, dtype, device, fraction):
    source, expected = case(Blocks, file_dtype, dtype)
    model = dynamic(Blocks, source, dtype, device=device())
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction)))
    for _ in range(3):
        assert same(model(model.module.input()), expected)


@pytest.mark.parametrize("streams", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 5, 20])
@pytest.mark.parametrize("fraction", [0.5, 0.0])
def test_any_number_of_streams_and_bundles_ahead(streams, prefetch, fraction):
    source, expected = case(stack, torch.bfloat16, torch.float32)
    model = dynamic(stack, source, device=SimDevice(streams=3), streams=streams, prefetch=prefetch)
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction), pinned_bytes=budget(model, 0.4)))
    for _ in range(3):
        assert same(model(model.module.input()), expected)


@pytest.mark.parametrize("fraction", BUDGETS)
@pytest.mark.parametrize("eager", [False, True], ids=["deferred", "eager"])
def test_weights_of_mixed_dtypes_keep_what_the_model_gives_each(eager, fraction):
    def build():
        module = Stack(8)
        for index, layer in enumerate(module.layers):
            layer.to([torch.float32, torch.bfloat16, torch.float8_e4m3fn][index % 3])
        return module

    state = {key: tensor.to(torch.float16) for key, tensor in random_state(Stack(8), torch.float32).items()}
    reference = build().requires_grad_(False)
    for key, parameter in reference.named_parameters():
        parameter.data = state[key].to(parameter.dtype)
    model = dynamic(lambda: build(), StateDict(state), None, device=SimDevice(eager=eager))
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction)))
    for _ in range(3):
        assert same(model(model.module.input()), reference(reference.input()))
