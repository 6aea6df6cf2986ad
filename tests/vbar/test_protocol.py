"""What every VBAR does, by example; test_vbar_model.py has what holds for any sequence. Sizes are in a device's units.

To add an implementation, add its device to DEVICES in vbar_devices.py.
"""

import gc

import pytest
import torch

from kit.vbar_devices import DEVICES
from spillway.ops.vbar import cap
from spillway.ops.vbar import software as software_vbar

ALL = 1 << 60


@pytest.fixture(params=DEVICES, ids=lambda device: device.__name__)
def make_device(request):
    made = []

    def make(**sizes):
        made.append(request.param(**sizes))
        return made[-1]

    yield make
    gc.collect()
    for device in made:
        device.check_after()


@pytest.fixture(autouse=True)
def poll_always(monkeypatch):
    monkeypatch.setattr(software_vbar, "POLL_SECONDS", 0)


def slices(vbar, device, *units):
    return [vbar.alloc(size * device.unit) for size in units]


def bring(vbar, piece, pinned=False):
    """Fault a slice in and let go of it; whether there was room."""
    signature = vbar.fault(piece)
    if signature is not None and not pinned:
        vbar.unpin(piece)
    return signature is not None


def resident(vbar, pieces):
    return [vbar.resident(piece) for piece in pieces]


def test_an_allocation_maps_nothing(make_device):
    device = make_device()
    vbar = device.vbar()
    pieces = slices(vbar, device, 4, 4)
    assert vbar.loaded_size() == 0
    assert resident(vbar, pieces) == [False, False]


def test_a_faulted_slice_is_resident_and_has_memory_of_its_own(make_device):
    device = make_device()
    vbar = device.vbar()
    a, b = slices(vbar, device, 2, 3)
    for number, piece in enumerate((a, b)):
        assert vbar.fault(piece) is not None
        device.write(vbar.tensor(piece), number)
    assert vbar.loaded_size() == 5 * device.unit
    for number, piece in enumerate((a, b)):
        memory = vbar.tensor(piece)
        assert memory.dtype == torch.uint8 and memory.dim() == 1 and memory.numel() >= piece.nbytes
        assert device.holds(memory, number)


def test_the_signature_stays_the_same_while_a_slice_stays(make_device):
    device = make_device()
    vbar = device.vbar()
    (piece,) = slices(vbar, device, 1)
    first = vbar.fault(piece)
    vbar.unpin(piece)
    assert vbar.same(vbar.fault(piece), first)


def test_the_signature_changes_with_an_eviction(make_device):
    device = make_device()
    vbar = device.vbar()
    (piece,) = slices(vbar, device, 1)
    first = vbar.fault(piece)
    vbar.unpin(piece)
    vbar.free_memory(1)
    vbar.prioritize()
    assert not vbar.same(vbar.fault(piece), first)


def test_no_signature_is_the_same_as_none(make_device):
    device = make_device()
    vbar = device.vbar()
    (piece,) = slices(vbar, device, 1)
    assert not vbar.same(vbar.fault(piece), None)


def test_no_slice_is_never_resident(make_device):
    vbar = make_device().vbar()
    assert vbar.fault(None) is None
    assert not vbar.resident(None)


def test_a_pinned_slice_is_not_evicted_until_its_last_unpin(make_device):
    device = make_device()
    vbar = device.vbar()
    (piece,) = slices(vbar, device, 1)
    vbar.fault(piece)
    vbar.fault(piece)
    assert vbar.free_memory(ALL) == 0
    vbar.unpin(piece)
    assert vbar.free_memory(ALL) == 0
    vbar.unpin(piece)
    vbar.free_memory(ALL)  # it may have gone already: it was above what is wanted
    assert vbar.loaded_size() == 0


def test_what_lies_highest_is_evicted_first(make_device):
    device = make_device()
    vbar = device.vbar()
    pieces = slices(vbar, device, 1, 1, 1, 1)
    for piece in (pieces[2], pieces[0], pieces[3], pieces[1]):
        bring(vbar, piece)
    for left in (3, 2, 1, 0):
        assert vbar.free_memory(1) == device.unit
        assert resident(vbar, pieces) == [index < left for index in range(4)]


def test_freeing_evicts_no_more_than_it_must_and_passes_over_pinned_slices(make_device):
    device = make_device()
    vbar = device.vbar()
    pieces = slices(vbar, device, 1, 1, 1, 1)
    for piece in pieces:
        bring(vbar, piece, pinned=piece is pieces[3])
    assert vbar.free_memory(2 * device.unit) == 2 * device.unit
    assert resident(vbar, pieces) == [True, False, False, True]


def test_an_eviction_lowers_the_watermark_until_prioritize(make_device):
    device = make_device()
    vbar = device.vbar()
    low, high = slices(vbar, device, 1, 1)
    bring(vbar, low)
    bring(vbar, high)
    vbar.free_memory(1)
    assert not bring(vbar, high)
    assert bring(vbar, low)
    vbar.prioritize()
    assert bring(vbar, high)


def test_the_limit_admits_what_lies_below_it(make_device):
    device = make_device()
    vbar = device.vbar()
    pieces = slices(vbar, device, 2, 2, 2)
    vbar.set_limit(4 * device.unit)
    assert [bring(vbar, piece) for piece in reversed(pieces)] == [False, True, True]
    vbar.prioritize()
    assert not bring(vbar, pieces[2])
    vbar.set_limit(None)
    assert bring(vbar, pieces[2])


def test_a_lower_limit_evicts_at_once_from_the_top(make_device):
    device = make_device()
    vbar = device.vbar()
    pieces = slices(vbar, device, 2, 2, 2)
    for piece in pieces:
        bring(vbar, piece)
    vbar.set_limit(3 * device.unit)
    assert resident(vbar, pieces) == [True, False, False]
    vbar.set_limit(0)
    assert vbar.loaded_size() == 0
    assert not bring(vbar, pieces[0])


def test_a_pinned_slice_above_a_lowered_limit_goes_when_it_is_let_go(make_device):
    device = make_device()
    vbar = device.vbar()
    pieces = slices(vbar, device, 2, 2)
    for piece in pieces:
        vbar.fault(piece)
    vbar.set_limit(2 * device.unit)
    assert vbar.resident(pieces[1])
    vbar.unpin(pieces[1])
    assert resident(vbar, pieces) == [True, False]


def test_a_full_device_refuses(make_device):
    device = make_device(capacity=3)
    vbar = device.vbar()
    pieces = slices(vbar, device, 2, 2)
    assert [bring(vbar, piece) for piece in pieces] == [True, False]


def test_what_lies_low_displaces_what_lies_high(make_device):
    device = make_device(capacity=3)
    vbar = device.vbar()
    low, high = slices(vbar, device, 2, 2)
    bring(vbar, high)
    assert bring(vbar, low)
    assert resident(vbar, [low, high]) == [True, False]


def test_the_headroom_is_never_granted(make_device):
    device = make_device(capacity=5, headroom=2)
    vbar = device.vbar()
    pieces = slices(vbar, device, 1, 1, 1, 1)
    assert [bring(vbar, piece) for piece in pieces] == [True, True, True, False]
    assert device.free() >= 2


def test_memory_that_others_take_is_given_up_within_a_few_faults(make_device):
    device = make_device(capacity=10, headroom=2)
    vbar = device.vbar()
    pieces = slices(vbar, device, *[1] * 8)
    assert all(bring(vbar, piece) for piece in pieces)
    device.others_take(3)
    for _ in range(device.traits.looks):
        bring(vbar, pieces[0])
    assert resident(vbar, pieces) == [True] * 5 + [False] * 3
    assert device.free() == 2


def test_memory_that_others_give_back_is_used_after_prioritize(make_device):
    device = make_device(capacity=4)
    vbar = device.vbar()
    device.others_take(2)
    pieces = slices(vbar, device, 1, 1, 1)
    assert [bring(vbar, piece) for piece in pieces] == [True, True, False]
    device.others_take(0)
    vbar.prioritize()
    assert bring(vbar, pieces[2])


def test_the_model_of_highest_priority_takes_from_the_others(make_device):
    device = make_device(capacity=4)
    one, two = device.vbar(), device.vbar()
    ones, twos = slices(one, device, 2, 2), slices(two, device, 2, 2)
    assert [bring(one, piece) for piece in ones] == [True, True]
    one.prioritize()
    assert [bring(two, piece) for piece in twos] == [False, False]
    two.prioritize()
    assert [bring(two, piece) for piece in twos] == [True, True]
    assert resident(one, ones) == [False, False]


def test_a_deprioritized_model_is_evicted_from_before_the_others(make_device):
    device = make_device(capacity=6)
    one, two, three = device.vbar(), device.vbar(), device.vbar()
    (a,), (b,), (c,) = slices(one, device, 2), slices(two, device, 2), slices(three, device, 4)
    bring(one, a)
    bring(two, b)
    two.deprioritize()
    three.prioritize()
    assert bring(three, c)
    assert one.resident(a) and not two.resident(b)


def test_pinned_slices_of_other_models_stay(make_device):
    device = make_device(capacity=2)
    one, two = device.vbar(), device.vbar()
    (a,), (b,) = slices(one, device, 2), slices(two, device, 2)
    bring(one, a, pinned=True)
    two.prioritize()
    assert not bring(two, b)
    assert one.resident(a)


def test_close_gives_everything_back_and_leaves_the_others_alone(make_device):
    device = make_device(capacity=4)
    one, two = device.vbar(), device.vbar()
    (a,), (b,) = slices(one, device, 2), slices(two, device, 2)
    bring(one, a, pinned=True)
    bring(two, b)
    one.close()
    assert device.free() == 2
    assert two.resident(b)
    two.free_memory(ALL)
    assert device.free() == 4


def test_a_vbar_that_nobody_holds_any_more_gives_its_memory_back(make_device):
    device = make_device(capacity=4)
    vbar = device.vbar()
    bring(vbar, *slices(vbar, device, 3))
    assert device.free() == 1
    del vbar
    gc.collect()
    assert device.free() == 4


# --- the cap over all VBARs -------------------------------------------------------------------------------------------


def test_vbars_together_hold_no_more_than_the_cap(make_device):
    """The one that was prioritized last gets what the others hold. They get no more than it leaves."""
    device = make_device()
    one, other = device.vbar(), device.vbar()
    mine, theirs = slices(one, device, 1, 1, 1), slices(other, device, 1, 1, 1)
    cap.set_cap(one.backend.device, 4 * device.unit)
    try:
        for vbar, pieces, left in ((one, mine, 0), (other, theirs, 1), (one, mine, 1)):
            vbar.prioritize()
            assert all(bring(vbar, piece) for piece in pieces)
            assert [v.loaded_size() // device.unit for v in (one, other) if v is not vbar] == [left]
        assert not bring(other, theirs[2])  # of lower rank now, so it takes nothing
        assert cap.reach(other) == device.unit and cap.reach(one) == 4 * device.unit
        one.free_memory(ALL)
        other.prioritize()
        assert all(bring(other, piece) for piece in theirs)
    finally:
        cap.set_cap(one.backend.device, None)
    one.prioritize()
    assert all(bring(one, piece) for piece in mine) and other.loaded_size() == 3 * device.unit
    one.close()
    other.close()
