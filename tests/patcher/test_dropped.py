"""Models that are freed or dropped by other threads while transfers are under way."""

import gc
import threading
from contextlib import contextmanager

import pytest

from kit.nets import Stack, dynamic, same, write
from kit.sim_device import SimDevice
from spillway.ops.device.readers import Inline

DEPTH = 6


class Watched(SimDevice):
    """Notes whether a thread that waits has made the device current."""

    def __init__(self):
        super().__init__()
        self.here, self.waits = threading.local(), []

    @contextmanager
    def current(self):
        before, self.here.current = getattr(self.here, "current", False), True
        try:
            yield
        finally:
            self.here.current = before

    def readers(self):
        return Inline()  # so that transfers are under way, and not yet to be begun

    def synchronize(self):
        self.waits.append((threading.get_ident(), getattr(self.here, "current", False)))
        super().synchronize()

    def is_idle(self):
        return all(stream.done == stream.given for stream in self.all_streams)


@pytest.fixture
def running(tmp_path):
    """A model that was interrupted half way, with transfers under way."""
    write(tmp_path / "m.safetensors", Stack(DEPTH))
    device = Watched()
    model = dynamic(lambda: Stack(DEPTH), tmp_path / "m.safetensors", device=device, vram_bytes=0, pinned_bytes=0)
    model(model.module.input())
    hook = model.module.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(model.module.input())
    hook.remove()
    assert not device.is_idle()
    device.waits.clear()
    return [model], device


def in_a_thread(work):
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
    return thread.ident


def drop(models):
    models.clear()
    gc.collect()


WAYS = {
    "drop": drop,
    "close": lambda models: models[0].close(),
    "release": lambda models: models[0].release(),
}


@pytest.mark.parametrize("way", WAYS)
def test_memory_that_goes_is_waited_for_by_the_thread_that_frees(running, way):
    models, device = running
    thread = in_a_thread(lambda: WAYS[way](models))
    assert device.is_idle()
    assert (thread, True) in device.waits
    assert all(current for _, current in device.waits)


def test_freeing_ends_what_is_under_way(tmp_path, running):
    models, device = running
    expected = dynamic(lambda: Stack(DEPTH), tmp_path / "m.safetensors")(Stack(DEPTH).input())
    in_a_thread(models[0].free)
    assert device.is_idle() and device.held() == 0
    model = models[0]
    assert same(model(model.module.input()), expected)
