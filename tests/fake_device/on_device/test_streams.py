"""Side streams of the fake device: what they are given happens when something waits for it, and not before."""

import gc

import pytest
import torch

MIB = 1 << 20


@pytest.fixture
def side(fake):
    return torch.cuda.Stream(device="cuda")


@pytest.fixture
def source():
    return torch.full((1000,), 5.0).pin_memory()


def copied(source, side, into=None):
    into = torch.empty(1000, device="cuda") if into is None else into
    side.wait_stream(torch.cuda.current_stream())
    return copied_at_once(source, side, into)


def copied_at_once(source, side, into):
    with torch.cuda.stream(side):
        into.copy_(source, non_blocking=True)
    return into


def test_a_copy_without_a_wait_leaves_poison(side, source):
    target = copied(source, side)
    assert target.isnan().all() and not side.query()
    side.synchronize()
    assert (target == 5).all() and side.query()


WAITS = {
    "wait_event": lambda side, event: torch.cuda.current_stream().wait_event(event),
    "event.wait": lambda side, event: event.wait(),
    "event.synchronize": lambda side, event: event.synchronize(),
    "wait_stream": lambda side, event: torch.cuda.current_stream().wait_stream(side),
    "synchronize": lambda side, event: torch.cuda.synchronize(),
    "synchronize_device": lambda side, event: torch.cuda.synchronize(torch.device("cuda", 0)),
    "accelerator": lambda side, event: torch.accelerator.synchronize(),
}


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_wait(side, source, name):
    first = copied(source, side)
    event = side.record_event()
    assert not event.query() and first.isnan().all()
    WAITS[name](side, event)
    assert (first == 5).all() and event.query()


def test_an_event_is_a_point_in_time(side, source):
    first = copied(source, side)
    event = torch.cuda.Event()
    event.record(side)
    second = copied(source, side)
    torch.cuda.current_stream().wait_event(event)
    assert (first == 5).all() and second.isnan().all()
    side.synchronize()
    assert (second == 5).all()


def test_one_side_stream_waits_for_another(side, source):
    other = torch.cuda.Stream()
    middle, end = torch.empty(1000, device="cuda"), torch.empty(1000, device="cuda")
    copied(source, side, middle)
    other.wait_stream(side)
    copied(middle, other, end)
    assert middle.isnan().all() and end.isnan().all()
    other.synchronize()
    assert (end == 5).all()


def test_the_source_is_read_when_the_copy_happens(side, source):
    target = copied(source, side)
    source.fill_(7)
    side.synchronize()
    assert (target == 7).all(), "page-locked memory was overwritten too early"
    pageable = torch.full((1000,), 5.0)
    copied(pageable, side, target)
    pageable.fill_(9)
    side.synchronize()
    assert (target == 5).all(), "pageable memory is read at once"


def test_copies_to_the_host(side):
    data = torch.arange(1000.0, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = data.to("cpu", non_blocking=True)
        waited = data.cpu()
    assert late.is_pinned() and torch.equal(waited, torch.arange(1000.0))
    assert torch.equal(late, waited)
    target = torch.full((1000,), -1.0).pin_memory()
    with torch.cuda.stream(side):
        target.copy_(data, non_blocking=True)
    assert (target == -1).all()
    side.synchronize()
    assert torch.equal(target, waited)


def test_kernels_on_a_side_stream_come_in_its_order(side, source):
    target = copied(source, side)
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        double = target * 2
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != side
    side.synchronize()
    assert (double == 10).all()


def test_copies_convert(side):
    source = torch.arange(12, dtype=torch.int32).view(3, 4).pin_memory()
    target = torch.empty(4, 3, dtype=torch.float16, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        target.t().copy_(source, non_blocking=True)
        broadcast = torch.empty(2, 3, device="cuda").copy_(source[0, :3], non_blocking=True)
    side.synchronize()
    assert torch.equal(target.t().cpu(), source.half()) and broadcast.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("freed", ["target", "source"])
def test_memory_freed_too_early_is_a_hazard(fake, side, freed):
    source = torch.full((1000,), 5.0).pin_memory()
    target = copied(source, side)
    if freed == "target":
        del target
    else:
        del source
    gc.collect()
    torch.cuda.synchronize()
    assert fake.hazards() == ["a copy on a side stream came when its memory was already freed"]


def test_recorded_memory_outlives_its_tensor(fake, side, source):
    before = fake.memory("used")
    target = copied(source, side)
    target.record_stream(side)
    del target
    assert fake.memory("used") > before
    side.synchronize()
    assert fake.memory("used") == before and not fake.hazards()


def test_eager_side_streams(fake, side, source):
    fake.driver.set(deferred=0)
    assert (copied(source, side) == 5).all()
    fake.driver.set(deferred=1)


def test_devices_and_their_streams(fake):
    assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1 and torch.ones(1, device="cuda").device.index == 1
        stream = torch.cuda.Stream()
        assert stream.device == torch.device("cuda", 1)
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream(1) == stream and torch.cuda.current_stream(0).cuda_stream == 0
    assert torch.cuda.current_device() == 0
    with pytest.raises(torch.AcceleratorError, match="ordinal"):
        torch.cuda.set_device(2)


OVERTAKES = "a copy on a side stream overtakes the main stream's use of its memory"


def test_overtaking_the_main_stream_is_a_hazard(fake, side, source):
    target = torch.zeros(1000, device="cuda")
    copied_at_once(source, side, target)  # the main stream may be writing zeroes
    side.synchronize()
    assert fake.hazards() == [OVERTAKES]
    copied(source, side, target)
    torch.cuda.current_stream().wait_stream(side)
    assert not fake.hazards()
    target.sum()
    copied_at_once(source, side, target)  # it may be read
    side.synchronize()
    assert fake.hazards() == [OVERTAKES]
    copied_at_once(source, side, torch.empty(1000, device="cuda"))  # fresh memory may be what the main stream uses
    side.synchronize()
    assert fake.hazards()[:1] == [OVERTAKES]


def test_what_does_not_overtake(fake, side, source):
    target = torch.empty(1000, device="cuda")
    torch.cuda.synchronize()
    copied_at_once(source, side, target)
    side.synchronize()
    result = target[:500].sum()
    copied_at_once(source[500:], side, target[500:])  # another part of the same memory
    with torch.cuda.stream(side):
        late = target[:500].to("cpu", non_blocking=True)  # both read
        own = torch.empty(1000, device="cuda")  # memory of the side stream
        own.copy_(source, non_blocking=True)
    side.synchronize()
    assert float(result) == 2500 == float(late.sum())
    event = torch.cuda.Event()
    target.sum()
    event.record()
    event.synchronize()
    copied_at_once(source, side, target)
    other = torch.cuda.Stream()
    target2 = torch.zeros(1000, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    other.wait_stream(side)
    copied_at_once(source, other, target2)
    torch.cuda.synchronize()
    assert not fake.hazards()
