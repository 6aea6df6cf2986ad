"""How long whoever launches kernels waits for readers is counted, in all and for each step."""

import time

from kit.nets import Stack, dynamic, write
from kit.sim_device import SimDevice
from spillway.ops.ledger import STALL_SECONDS, Ledger

SLOW = 0.02


def test_a_wait_is_a_stall_and_a_look_is_none():
    ledger = Ledger("it")
    with ledger.stalled():
        pass
    assert ledger.counters.stalls == 0 and ledger.counters.stall_seconds == 0
    with ledger.stalled():
        time.sleep(SLOW)
    assert ledger.counters.stalls == 1 and SLOW <= ledger.counters.stall_seconds < 50 * SLOW
    assert STALL_SECONDS < SLOW


def test_a_step_says_what_of_it_was_a_stall():
    ledger = Ledger("it")
    ledger.begin_step()
    with ledger.stalled():
        time.sleep(SLOW)
    ledger.begin_step()
    assert SLOW <= ledger.step.stalled <= ledger.step.seconds
    ledger.begin_step()
    assert ledger.step.stalled == 0


def test_a_reader_that_is_slow_stalls_the_step(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    write(path, Stack(4, 64))
    model = dynamic(lambda: Stack(4, 64), path, device=SimDevice(), vram_bytes=0, pinned_bytes=0)
    model(model.module.input())
    counters = model.ledger.counters
    before = counters.stalls

    class Slow:
        def __init__(self, job):
            self.job = job

        def wait(self):
            time.sleep(SLOW)
            if self.job is not None:
                self.job.wait()

        def cancel(self):
            if self.job is not None:
                self.job.cancel()

    caster = model.residency.caster
    complete = caster.complete

    def late(loan):
        loan.job = Slow(loan.job)
        return complete(loan)

    monkeypatch.setattr(caster, "complete", late)
    model(model.module.input())
    assert counters.stalls > before and counters.stall_seconds >= SLOW
    model.release()
