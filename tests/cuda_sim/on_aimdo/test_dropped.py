"""Pages go only from a thread that has the device, and has waited for it."""

import gc
import threading
from contextlib import contextmanager

import pytest

from cuda_sim.aimdo import PAGE
from kit.nets import Stack, dynamic, write
from spillway.ops.ledger import Ledger
from spillway.ops.vbar.aimdo import AimdoVBAR


def build():
    return Stack(6, 2040)


def vbar_alone(device):
    """A VBAR without the caster that waits before it lets go of its own."""
    vbar = AimdoVBAR(device, PAGE, Ledger("m"))
    place = vbar.alloc(PAGE)
    assert vbar.fault(place) is not None
    vbar.unpin(place)
    return vbar


WAYS = {
    "drop": lambda models: (models.clear(), gc.collect()),
    "close": lambda models: models[0].close(),
    "release": lambda models: models[0].release(),
    "free": lambda models: models[0].free(),
    "free a page": lambda models: models[0].free(PAGE),
    "lower the budget": lambda models: models[0].set_policy(models[0].policy.with_changes(vram_bytes=PAGE)),
}


@pytest.mark.parametrize("way", [*WAYS, "drop a VBAR"])
def test_pages_go_in_a_thread_that_has_waited_for_the_device(machine, tmp_path, monkeypatch, way):
    device = machine.make_device()
    here, events = threading.local(), []

    @contextmanager
    def current():
        before, here.current = getattr(here, "current", False), True
        try:
            yield
        finally:
            here.current = before

    def synchronize(wait=device.synchronize):
        wait()
        here.waited = getattr(here, "current", False)

    monkeypatch.setattr(device, "current", current)
    monkeypatch.setattr(device, "synchronize", synchronize)
    path = tmp_path / "m.safetensors"
    write(path, build())
    if way in WAYS:
        models = [dynamic(build, path, device=device, headroom_bytes=0)]
        models[0](models[0].module.input())
        assert models[0].resident_bytes == 3 * PAGE
    else:
        models = [vbar_alone(device)]

    from comfy_aimdo.model_vbar import lib

    def watched(native):
        def call(*arguments):
            before = machine.driver.get("mapped")
            result = native(*arguments)
            if machine.driver.get("mapped") < before:
                events.append(getattr(here, "waited", False) and getattr(here, "current", False))
            return result

        return call

    for name in ("vbar_free", "vbar_free_memory"):
        monkeypatch.setattr(lib, name, watched(getattr(lib, name)))
    thread = threading.Thread(target=WAYS.get(way, WAYS["drop"]), args=(models,))
    thread.start()
    thread.join()
    monkeypatch.undo()
    assert events and all(events)
    for model in models:
        model.close()
