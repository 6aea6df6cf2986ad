"""A cap over all models together: the models that are used share what it allows, and none holds more."""

import pytest
import torch
from safetensors.torch import load_file

from kit.nets import Stack, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.ops.vbar.cap import cap_of, set_cap

DEVICES = {"cpu": lambda: None, "device": SimDevice}


def build():
    return Stack(12, 96)


@pytest.fixture
def models(tmp_path, request):
    """`models(2)`: as many models on one device, in float32 so that a CPU has something to keep too; and the output."""
    path = tmp_path / "m.safetensors"
    write(path, build(), torch.bfloat16)
    made = []

    def make(count, device, **policy):
        made.extend(dynamic(build, path, device=device, **policy) for _ in range(count))
        return made, plain(build, load_file(path), torch.float32)(made[0].module.input())

    yield make
    for model in made:
        set_cap(model.device, None)
        model.close()


def run(model):
    return model(model.module.input())


def held(made):
    return sum(model.resident_bytes for model in made)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_models_together_hold_no_more_than_the_cap(device, models):
    made, wanted = models(3, device())
    whole = made[0].total_bytes
    set_cap(made[0].device, int(1.5 * whole))
    for _ in range(2):
        for model in made:
            model.expect_use()
            assert same(run(model), wanted)
            assert held(made) <= 1.5 * whole
    # The model that was used last has all that it can use. The others have what that leaves.
    assert made[-1].resident_bytes == whole and 0 < held(made[:-1]) <= whole // 2
    assert "for all models together" in " ".join(made[-1].ledger.decisions)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_cap_holds_from_the_next_step_on_and_is_lifted_again(device, models):
    made, wanted = models(1, device())
    (model,) = made
    run(model)
    assert model.resident_bytes == model.total_bytes
    for share in (0.5, 0.0, 0.75):
        set_cap(model.device, int(share * model.total_bytes))
        assert cap_of(model.device) == int(share * model.total_bytes)
        for _ in range(2):
            assert same(run(model), wanted)
            assert model.resident_bytes <= share * model.total_bytes
        assert (model.resident_bytes > 0) == (share > 0)
    set_cap(model.device, None)
    run(model)
    run(model)
    assert model.resident_bytes == model.total_bytes


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_policy_below_the_cap_holds_too(device, models):
    made, wanted = models(2, device())
    whole = made[0].total_bytes
    set_cap(made[0].device, whole)
    made[0].set_policy(made[0].policy.with_changes(vram_bytes=whole // 4))
    for model in (*made, *made):
        assert same(run(model), wanted)
        assert held(made) <= whole and made[0].resident_bytes <= whole // 4


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_model_that_runs_within_another_ones_step_leaves_the_cap_alone(device, models):
    """As a ControlNet does that a patch calls: the outer model goes on bringing weights afterwards."""
    made, wanted = models(2, device())
    outer, inner = made
    whole = outer.total_bytes
    set_cap(outer.device, whole)
    layers = list(outer.module.children())
    middle = next(part for part in outer.module.modules() if hasattr(part, "spillway_bundle"))
    assert layers
    most = []

    def within(*_):
        assert same(run(inner), wanted)
        most.append(held(made))

    handle = middle.register_forward_hook(within)
    for _ in range(3):
        assert same(run(outer), wanted)
        most.append(held(made))
    handle.remove()
    assert len(most) == 6 and max(most) <= whole


def test_a_cap_of_less_than_nothing_is_refused():
    with pytest.raises(ValueError, match="expected 0 or more, or None"):
        set_cap(torch.device("cpu"), -1)
    assert cap_of(torch.device("cpu")) is None
