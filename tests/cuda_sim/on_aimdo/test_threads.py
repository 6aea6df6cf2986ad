"""Two prompts' threads, memory that others take, and calls to free memory, all at once, on one device."""

import random
import sys
import threading

import pytest
import torch

from kit.nets import Stack, dynamic, plain, same, write

OPERATIONS = 5_000  # of each thread
DEPTH = 9


def shallow():
    """Nine bundles of 256 KiB: many loans in little time."""
    return Stack(DEPTH, 256)


class Prompt(threading.Thread):
    """Runs one model again and again, and counts what it lent."""

    def __init__(self, model, want, until):
        super().__init__(daemon=True)
        self.model, self.want, self.until = model, want, until
        self.operations = 0
        self.error = None

    def run(self):
        try:
            x = self.model.module.input()
            while not self.until():
                assert same(self.model(x), self.want), "a wrong result"
                self.operations += DEPTH
        except BaseException as error:
            self.error = error


class Freeing(threading.Thread):
    """Frees memory, as ComfyUI does when something else needs it, and lets others take and return some."""

    def __init__(self, machine, models, until):
        super().__init__(daemon=True)
        self.machine, self.models, self.until = machine, models, until
        self.operations = 0
        self.error = None

    def run(self):
        chance = random.Random(0)
        actions = [
            lambda model: model.free(),
            lambda model: model.free(chance.randrange(1 << 22)),
            lambda model: model.free_pins(),
            lambda model: model.resident_bytes,
            lambda model: self.machine.leave_pages(chance.randrange(6)),
        ]
        try:
            while not self.until():
                chance.choice(actions)(chance.choice(self.models))
                self.operations += 1
        except BaseException as error:
            self.error = error


@pytest.fixture(autouse=True)
def many_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("served", [True, False], ids=["comfy-aimdo", "software"])
def test_fifteen_thousand_operations_of_three_threads(machine, tmp_path, served):
    device = machine.make_device(deferred=True, served=served)
    models, wants = [], []
    for seed in range(2):
        path = tmp_path / f"{seed}.safetensors"
        reference = plain(shallow, write(path, shallow(), seed=seed), torch.float32)
        models.append(dynamic(shallow, path, device=device, pinned_bytes=1 << 21, headroom_bytes=0))
        wants.append(reference(reference.input()))

    threads = []

    def until():
        return all(t.operations >= OPERATIONS for t in threads) or any(t.error for t in threads)

    threads += [Prompt(model, want, until) for model, want in zip(models, wants, strict=True)]
    threads.append(Freeing(machine, models, until))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    for thread in threads:
        if thread.error is not None:
            raise thread.error
    assert all(thread.operations >= OPERATIONS for thread in threads)
    machine.leave_pages(6)
    for model, want in zip(models, wants, strict=True):
        assert same(model(model.module.input()), want)
        model.close()
