"""What is foreseen of a step, from the sizes of its bundles, is what the steps of a run then are."""

import logging

import pytest
import torch

from kit.nets import Blocks, Stack, budget, dynamic, write
from kit.shuffled import Shuffled
from kit.sim_device import SimDevice
from spillway.ops.int8.weight import Int8Rows
from spillway.patcher.dynamic_model import models
from spillway.patcher.forecast import Place, foresee
from spillway.patcher.load_plan import LoadState

MIB = 1 << 20
ENDLESS = Place(reach=1 << 40)
NETS = {"stack": lambda: Stack(16, 96), "stock layers": lambda: Blocks(6, 96), "another order": lambda: Shuffled(3)}
SHARES = (0.0, 0.3, 0.7, 1.0)
EXACT = 0.05
PLAIN = ("as the file", "cast")


def every_linear(module, name, weight):
    return Int8Rows() if type(module) is torch.nn.Linear else None


def patched(model, share=2):
    """Put a patch on every second matrix, as a LoRA does."""
    keys = [param.key for bundle in model.bundles for param in bundle.params if param.source.dim() > 1]
    model.set_patches({key: lambda weight: weight * 0.5 for key in keys[::share]})


FORMS = {
    "as the file": (torch.float32, {}, lambda model: None),
    "cast": (torch.bfloat16, {}, lambda model: None),
    "patched": (torch.float32, {}, patched),
    "cast and patched": (torch.bfloat16, {}, patched),
    "quantised": (torch.bfloat16, {"quantise": every_linear}, lambda model: None),
}


def input_of(model):
    return model.module.input() if hasattr(model.module, "input") else torch.arange(10)[None]


def settle(model, steps=6):
    """Run until steps are alike. Return the bytes that the last one brought."""
    before = 0
    for _ in range(steps):
        before = model.ledger.counters.bytes_streamed
        model(input_of(model))
    return model.ledger.counters.bytes_streamed - before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net", NETS)
def test_a_forecast_is_what_the_steps_are(tmp_path, net, form):
    build, (dtype, made, change) = NETS[net], FORMS[form]
    path, orders = tmp_path / "m.safetensors", tmp_path / "orders.json"
    write(path, build(), dtype)

    def model(share=1.0, **more):
        one = dynamic(build, path, device=SimDevice(), orders_file=orders, headroom_bytes=0, **made, **more)
        change(one)
        one.set_policy(one.policy.with_changes(vram_bytes=budget(one, share)))
        return one

    settle(model())  # in which order the layers run is seen once
    states = set()
    for share in SHARES:
        ran = model(share)
        streamed = settle(ran)
        told = foresee(model(share, sketch=True), ENDLESS)
        assert told.streamed == streamed, (net, form, share)
        assert told.resident == ran.resident_bytes
        # The device counts no temporaries of patches. The model adds up peaks that come one after the other.
        assert (1 - EXACT) * ran.backend.peak <= told.peak <= (1 + EXACT) * ran.peak_bytes
        assert told.placed == told.computation == 0 and (told.loading == 0 or form == "quantised")
        if form in PLAIN:
            assert told.peak == pytest.approx(ran.backend.peak, rel=EXACT)
        assert told.order_known
        states.add(told.state)
        ran.close()
    assert len(states) > 1


def test_nothing_is_read_allocated_said_or_listed(tmp_path, caplog):
    path = tmp_path / "m.safetensors"
    write(path, Stack(16, 96))
    device, before = SimDevice(), set(models)
    with caplog.at_level(logging.DEBUG):
        sketch = dynamic(NETS["stack"], path, device=device, vram_bytes=200_000, sketch=True)
        told = foresee(sketch, ENDLESS)
    assert told.state is LoadState.PARTIAL and 0 < told.streamed < told.total
    assert device.held() == 0 and not caplog.records and set(models) == before


def test_what_is_not_known_is_not_said(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, Stack(16, 96))
    told = foresee(dynamic(NETS["stack"], path, device=SimDevice(), vram_bytes=0, sketch=True), ENDLESS)
    assert (told.bus, told.compute, told.step, told.at_least) == (None,) * 4
    told = foresee(dynamic(NETS["stack"], path, device=SimDevice(), vram_bytes=0, sketch=True), Place(1 << 40, bus=1e6))
    assert told.bus == told.at_least == told.streamed / 1e6


def test_free_memory_the_computation_and_a_cap_limit_it(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, Stack(16, 96))

    def told(place, computation=0, **policy):
        model = dynamic(NETS["stack"], path, device=SimDevice(), headroom_bytes=0, sketch=True, **policy)
        return foresee(model, place, computation)

    total = told(ENDLESS).total
    assert told(ENDLESS).resident == told(Place(2 * total)).resident == total
    assert 0 < told(Place(total // 2)).resident < total // 2
    assert told(Place(2 * total), computation=3 * total // 2).resident == told(Place(total // 2)).resident
    assert told(Place(2 * total, capped=total // 2)).resident == told(Place(total // 2)).resident
    follows = told(Place(2 * total, follows=True), computation=3 * total // 2)
    assert follows.resident == total and follows.peak == total * 5 // 2 + follows.placed
