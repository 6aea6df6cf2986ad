"""An arena that grows leaves what final forms on their way back to their pins hold: all together keep to the room."""

import pytest

from kit.nets import Stack, dynamic, write
from kit.sim_device import SimDevice
from spillway.ops.lending.loan import Loan

SMALL, LARGE, WRITTEN = 1 << 16, 1 << 18, 1 << 15


class Later:
    """The event after a write-back that the device comes to when somebody waits for it."""

    def __init__(self):
        self.waited = False

    def query(self):
        return self.waited

    def synchronize(self):
        self.waited = True


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("room", [LARGE, LARGE + WRITTEN])
def test_it_waits_for_what_is_written_back_where_both_have_no_room(tmp_path, room, ahead):
    path = tmp_path / "m.safetensors"
    write(path, Stack(4, 64))
    model = dynamic(lambda: Stack(4, 64), path, device=SimDevice(), vram_bytes=0)
    model(model.module.input())
    caster, bundle, event = model.residency.caster, model.bundles[1], Later()
    caster.free_buffers()
    caster.room = room
    caster.arena.resize(SMALL)
    caster.arena.give(caster.arena.take(1), None)
    caster.arena.resize(LARGE)
    caster.write_backs._under_way.append((event, caster.backend.empty(WRITTEN)))
    assert caster.arena.nbytes == SMALL and caster.buffer_bytes == SMALL + WRITTEN
    loan = Loan(bundle, None)
    loan.brings_final = True
    fits = room == LARGE + WRITTEN
    assert caster._arena_has_room(loan, ahead) == (fits or not ahead)
    assert event.waited == (not fits and not ahead)
    caster.arena.take(LARGE)
    assert caster.buffer_bytes <= room or (ahead and not fits), "nothing is begun ahead of its use then"
    event.waited = True
    model.release()
