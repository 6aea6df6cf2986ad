"""The engine on a device: the plain module's bits there, at any residency, with pins, patches and INT8."""

import threading

import pytest
import torch

from kit.nets import Blocks, Stack, budget, plain, random_state, same
from spillway.ops.device.backend import backend_for
from spillway.ops.files.source import StateDict
from spillway.ops.int8.weight import Int8Rows
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

WIDE = 1024  # bundles of 2 to 4 MiB: a page of comfy-aimdo holds several
VBARS = ("auto", "software")


def stack():
    return Stack(10, WIDE)


def int8(module, name, weight):
    return Int8Rows() if weight.dim() == 2 else None


class Linear(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)


def on(device, module):
    """Inputs and module on the device, with exact products: TF32 would be another computation for another shape."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return module.to(device), module.input().to(device)


def model_on(device, build, state, dtype, vbar="auto", **options):
    module = build().to(dtype).requires_grad_(False)
    return DynamicModel(module, StateDict(state), device, Policy(vbar=vbar), **options)


def limit(model, fraction, pins):
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction), pinned_bytes=budget(model, pins)))


def run(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("vbar", VBARS)
@pytest.mark.parametrize("fraction", [None, 0.6, 0.0])
@pytest.mark.parametrize("pins", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(
    ("build", "stored", "dtype"),
    [
        (stack, torch.float32, torch.float32),
        (stack, torch.bfloat16, torch.bfloat16),
        (stack, torch.float8_e4m3fn, torch.bfloat16),
        (Blocks, torch.float16, torch.float16),
    ],
)
def test_the_bits_of_the_plain_module(device, build, stored, dtype, pins, fraction, vbar):
    state = random_state(build(), stored)
    reference, x = on(device, plain(build, state, dtype))
    wanted = run(reference, x)
    model = model_on(device, build, state, dtype, vbar)
    limit(model, fraction, pins)
    for _ in range(4):
        assert same(run(model, x).cpu(), wanted.cpu())
    model.close()


@pytest.mark.parametrize("vbar", VBARS)
@pytest.mark.parametrize("fraction", [None, 0.6, 0.0])
def test_patches_come_and_go_while_weights_are_evicted(device, fraction, vbar):
    state = random_state(stack(), torch.float32)
    model = model_on(device, stack, state, torch.float32, vbar)
    limit(model, fraction, 2.0)
    for factor in (1, 2, 4, 1):  # powers of two: their products are exact
        reference, x = on(device, plain(stack, state, torch.float32))
        for layer in reference.layers[::2]:
            layer.weight.data = layer.weight.data * factor
        model.set_patches({f"layers.{index}.weight": lambda weight, f=factor: weight * f for index in range(0, 10, 2)})
        for _ in range(3):
            assert same(run(model, x).cpu(), run(reference, x).cpu())
        model.free(model.total_bytes // 3)
        del reference
    model.close()


@pytest.mark.parametrize("vbar", VBARS)
def test_another_thread_frees_memory_all_the_time(device, vbar):
    state = random_state(stack(), torch.float32)
    reference, x = on(device, plain(stack, state, torch.float32))
    wanted = run(reference, x).cpu()
    model = model_on(device, stack, state, torch.float32, vbar)
    done = threading.Event()

    def free():
        while not done.is_set():
            model.free(4 << 20)
            done.wait(0.0005)

    thread = threading.Thread(target=free)
    thread.start()
    try:
        for _ in range(20):
            assert same(run(model, x).cpu(), wanted)
    finally:
        done.set()
        thread.join()
    model.close()


def test_two_models_take_turns_in_memory_for_one(device):
    state = random_state(stack(), torch.float32)
    reference, x = on(device, plain(stack, state, torch.float32))
    wanted = run(reference, x).cpu()
    models = [model_on(device, stack, state, torch.float32) for _ in range(2)]
    for turn in range(4):
        model = models[turn % 2]
        assert same(run(model, x).cpu(), wanted)
        models[1 - turn % 2].free()
    for model in models:
        model.close()


@pytest.mark.parametrize("fraction", [None, 0.0])
def test_int8_is_near_and_the_same_at_any_residency(device, fraction):
    state = random_state(Stack(3, 256, Linear), torch.float32)
    reference, x = on(device, plain(lambda: Stack(3, 256, Linear), state, torch.float32))
    exact = run(reference, x)
    model = model_on(device, lambda: Stack(3, 256, Linear), state, torch.float32, quantise=int8)
    limit(model, fraction, 2.0)
    first = run(model, x)
    assert float((first - exact).norm() / exact.norm()) < 0.1
    assert all(same(run(model, x).cpu(), first.cpu()) for _ in range(3))
    model.close()


def test_a_sound_device_stepped_nothing_down(device):
    """Fails on a device that the check does without something on. The report says what."""
    backend = backend_for(device)
    model = model_on(backend.device, stack, random_state(stack(), torch.float32), torch.float32)
    assert model.first_use().failed == {}
    model.close()
