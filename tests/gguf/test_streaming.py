"""Weights in blocks that are lent: resident, streamed, pinned, with a branch, merged. On streams that are deferred."""

import pytest
import torch

from kit.gguf_files import random_blocks
from kit.nets import same
from kit.sim_device import SimDevice
from spillway.ops.gguf.dequantise import IN_TORCH
from spillway.ops.gguf.weight import Form, GgufWeight
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

WIDTH, LAYERS = 256, 8


class Branch:
    """A low-rank patch that stays beside. rank: as the engine asks for it."""

    rank = 3

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.down = torch.randn(3, WIDTH, generator=generator) * 0.1
        self.up = torch.randn(WIDTH, 3, generator=generator) * 0.1

    def low_rank(self, device):
        return self.down.to(device), self.up.to(device)


def merged(weight):
    return weight.add_(0.25)


def net(patch=None):
    """Return layers whose weights are blocks, and the same layers with the numbers that these stand for."""
    blocks, numbers = [torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))) for _ in range(2)]
    numbers.load_state_dict(blocks.state_dict())
    for index in range(LAYERS):
        raw = random_blocks("Q4_K", WIDTH * WIDTH, index)
        made = IN_TORCH["Q4_K"](raw, torch.float32).view(WIDTH, WIDTH).to(torch.bfloat16)
        form = Form("Q4_K", (WIDTH, WIDTH), torch.bfloat16)
        blocks[index].weight = torch.nn.Parameter(GgufWeight(raw, form), requires_grad=False)
        wanted = made.float()
        if patch is merged:
            wanted = merged(wanted)
        numbers[index].weight = torch.nn.Parameter(wanted, requires_grad=False)
    return blocks.requires_grad_(False), numbers.requires_grad_(False)


def beside(numbers, x):
    """Compute what layers with branches do."""
    for index, layer in enumerate(numbers):
        branch = Branch(index)
        # Branches travel in the dtype that the blocks stand for.
        down, up = (part.to(torch.bfloat16).float() for part in (branch.down, branch.up))
        x = layer(x) + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up)
    return x


@pytest.mark.parametrize("device", [None, "deferred", "eager", "overtaking"])
@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("pinned", [0.0, 2.0])
@pytest.mark.parametrize("patch", [None, "branch", merged])
def test_outputs_are_those_of_the_numbers(device, fraction, pinned, patch):
    module, numbers = net(patch)
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(9))
    expected = beside(numbers, x) if patch == "branch" else numbers(x)
    eager = {"deferred": False, "eager": True, "overtaking": "some"}
    backend = None if device is None else SimDevice(eager=eager[device])
    model = DynamicModel(module, None, "cpu", Policy(prefetch=2), backend=backend, model_dtype=lambda *_: torch.float32)
    if patch is not None:
        keys = [f"{index}.weight" for index in range(LAYERS)]
        model.set_patches({key: Branch(n) if patch == "branch" else patch for n, key in enumerate(keys)})
    limits = {"vram_bytes": int(fraction * model.total_bytes), "pinned_bytes": int(pinned * model.total_bytes)}
    model.set_policy(model.policy.with_changes(**limits))
    for _ in range(3):
        assert same(model(x), expected)
    assert model.peak_resident_bytes <= limits["vram_bytes"]
    model.close()
    assert same(module(x), numbers(x)) == (patch is not merged)


@pytest.mark.parametrize("device", [lambda: None, SimDevice], ids=["cpu", "device"])
@pytest.mark.parametrize("released", [False, True])
def test_a_patch_that_makes_weights_larger_keeps_its_pins(device, released):
    """The budget of pins follows, so nothing is patched again at the next step."""
    module, _ = net()
    wide = {"model_dtype": lambda *_: torch.float32}
    model = DynamicModel(module, None, "cpu", Policy(vram_bytes=0), backend=device(), **wide)
    x = torch.randn(2, WIDTH)
    model(x)
    if released:
        model.release(pins=False)
    model.set_patches({f"{index}.weight": merged for index in range(LAYERS)})
    model(x)
    patched = model.ledger.counters.patched
    model(x)
    assert model.ledger.counters.patched == patched == LAYERS


def test_what_reads_an_idle_weight_gets_its_numbers():
    module, numbers = net(merged)
    model = DynamicModel(
        module, None, "cpu", Policy(vram_bytes=0), backend=SimDevice(), model_dtype=lambda *_: torch.float32
    )
    model.set_patches({"3.weight": merged})
    x = torch.randn(2, WIDTH)
    model(x)
    assert same(module[3].weight + 0, numbers[3].weight) and model.ledger.counters.reads == 1
