"""The engine on the fake device, through its own backend for CUDA. Missing waits are noticed."""

import functools
import gc
import time

import pytest
import torch

from fake_device.device import start
from kit.nets import Blocks, Stack, budget, dynamic, plain, random_state, same
from spillway.ops.device.backend import DeviceError, StreamBackend, backend_for
from spillway.ops.files.source import StateDict
from spillway.patcher.first_use.check import check
from spillway.patcher.first_use.verdict import VBAR

DEVICE = torch.device("cuda", 0)
FORGOTTEN = 4  # seconds after which comfy-aimdo has forgotten that the device was full
CASES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float8_e4m3fn, torch.bfloat16),
]
BUDGETS = [None, 1.0, 0.5, 0.0]
# Whether copies wait as long as they may, or come at once, where dtypes make no difference.
TIMES = [
    *((1, *dtypes) for dtypes in CASES),
    (0, *CASES[0]),
    *(pytest.param(0, *dtypes, marks=pytest.mark.slow) for dtypes in CASES[1:]),
]


def stack():
    return Stack(10, 64)


@functools.cache
def case(build, file_dtype, dtype):
    """Source, plain output."""
    state = random_state(build(), file_dtype)
    reference = plain(build, state, dtype)
    with torch.no_grad():
        return StateDict(state), reference(reference.input())


@pytest.fixture(scope="module", autouse=True)
def comfy_aimdo():
    """Serves both devices, as ComfyUI has it."""
    start()
    import comfy_aimdo.control as control

    assert control.init("cuda") and control.init_devices([0, 1])
    control.set_log_critical()


def on_device(build, file_dtype=torch.float32, dtype=torch.float32, *, backend=None, vbar="software", fraction, pins):
    """A dynamic model on the device, and the plain module's output."""
    source, expected = case(build, file_dtype, dtype)
    backend = backend or backend_for("cuda")
    if vbar == "software":
        backend.aimdo_device = None
    model = dynamic(build, source, dtype, device=backend)
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction), pinned_bytes=budget(model, pins)))
    return model, expected


def run(model):
    with torch.no_grad():
        return model(model.module.input().to(model.device))


def test_the_engine_takes_it_for_cuda(fake):
    backend = backend_for("cuda")
    assert type(backend) is StreamBackend and backend.device == DEVICE
    assert backend.memory()[1] == fake.get("capacity")
    with pytest.raises(Exception, match="cuda:0, cuda:1"):
        backend_for("cuda:7")


@pytest.mark.parametrize("fraction", BUDGETS)
@pytest.mark.parametrize("pins", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("deferred", "file_dtype", "dtype"), TIMES)
@pytest.mark.parametrize("build", [stack, Blocks])
def test_the_bits_of_the_plain_module(fake, build, file_dtype, dtype, deferred, pins, fraction):
    fake.driver.set(deferred=deferred)
    model, expected = on_device(build, file_dtype, dtype, pins=pins, fraction=fraction)
    for _ in range(3):
        out = run(model)
        assert out.device == DEVICE and same(out.cpu(), expected)
    assert model.vbar_kind == "software"
    model.close()
    fake.driver.set(deferred=1)


@pytest.mark.parametrize("fraction", [None, 0.0])
@pytest.mark.parametrize("pins", [0.0, 0.5])
@pytest.mark.parametrize(("file_dtype", "dtype"), CASES)
def test_the_bits_of_the_plain_module_on_comfy_aimdo(fake, file_dtype, dtype, pins, fraction):
    model, expected = on_device(stack, file_dtype, dtype, vbar="aimdo", pins=pins, fraction=fraction)
    for _ in range(3):
        assert same(run(model).cpu(), expected)
    assert model.vbar_kind == "aimdo"
    assert (fake.get("mapped") > 0) == (fraction is None)
    model.close()
    assert fake.get("mapped") == 0


def test_a_full_device_is_there(fake):
    """Weights of others hold it, which give way when a model needs the room."""
    with fake.room(0):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1, device=DEVICE)
        assert type(backend_for(DEVICE)) is StreamBackend
    with pytest.raises(DeviceError, match=r"device 'cuda:7' cannot be used .* has: cpu, cuda:0, cuda:1"):
        backend_for("cuda:7")


def test_the_check_before_the_first_use_takes_less_than_a_second(fake):
    gc.collect()  # models of other tests would leave comfy-aimdo no memory, and the check would be put off
    held = {name: fake.get(name) for name in ("mapped", "allocated", "others", "capacity")}
    until = time.monotonic() + FORGOTTEN
    while (verdict := check(backend_for("cuda"))).not_run and time.monotonic() < until:
        time.sleep(0.1)
    verdicts = [verdict, *(check(backend_for("cuda")) for _ in range(2))]
    said = [held, *((verdict.passed, verdict.failed, verdict.not_run) for verdict in verdicts)]
    assert all(verdict.failed == {} and VBAR in verdict.passed for verdict in verdicts), said
    assert min(verdict.seconds for verdict in verdicts) < 1


def test_a_check_is_put_off_on_a_device_that_was_full_just_now_and_made_later(fake):
    """comfy-aimdo goes by what was free when an allocation was refused, for two or three seconds."""
    with fake.room(0), pytest.raises(torch.OutOfMemoryError):
        torch.empty(1, device=DEVICE)
    first = check(backend_for("cuda"))
    assert first.failed == {} and (VBAR in first.passed or "no room" in first.not_run[VBAR])
    time.sleep(FORGOTTEN)
    later = check(backend_for("cuda"))
    assert later.failed == later.not_run == {} and VBAR in later.passed


def test_synchronising_waits_for_side_streams(fake):
    backend = backend_for("cuda")
    source, back, target = backend.host_empty(64), backend.host_empty(64), backend.empty(64)
    source.copy_(torch.arange(64)), back.zero_()
    backend.synchronize()
    streams = [backend.stream(), backend.stream()]
    backend.copy(target, source, streams[0])
    backend.wait(backend.record(streams[0]), streams[1])
    backend.copy(back, target, streams[1])
    assert not back.any()
    backend.synchronize()
    assert same(back, source)


@pytest.mark.parametrize("vbar", ["software", "aimdo"])
def test_patches_are_made_on_the_device(fake, vbar):
    model, _ = on_device(stack, vbar=vbar, fraction=0.5, pins=0.5)
    seen = []

    def patch(weight):
        seen.append(weight.device)
        return weight + torch.ones(1, device=weight.device)

    model.set_patches({param.key: patch for bundle in model.bundles for param in bundle.params})
    state = random_state(stack(), torch.float32)
    reference = plain(stack, {key: tensor + 1 for key, tensor in state.items()}, torch.float32)
    for _ in range(2):
        assert same(run(model).cpu(), reference(reference.input()))
    assert set(seen) == {DEVICE}
    model.close()


@pytest.mark.parametrize("vbar", ["software", "aimdo"])
def test_a_model_on_each_device(fake, vbar):
    backends = [backend_for(f"cuda:{number}") for number in range(2)]
    models = [on_device(stack, backend=backend, vbar=vbar, fraction=0.5, pins=0.5)[0] for backend in backends]
    expected = case(stack, torch.float32, torch.float32)[1]
    for _ in range(2):
        for number, model in enumerate(models):
            out = run(model)
            assert out.device.index == number and model.vbar_kind == vbar and same(out.cpu(), expected)
    for model in models:
        model.close()


class Reading(torch.nn.Module):
    """Reads a buffer before its first layer and writes into another one behind it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(64.0))
        self.register_buffer("runs", torch.zeros(1))
        self.layer = torch.nn.Linear(64, 64)

    def forward(self, x):
        x = self.layer(x + self.table)
        self.runs += x.new_ones(1)
        return x

    def input(self):
        return torch.ones(2, 64)


def test_buffers_are_where_the_module_computes(fake):
    model, expected = on_device(Reading, fraction=0.0, pins=0.5)
    runs = model.module.runs.clone()
    assert same(run(model).cpu(), expected)
    assert {buffer.device for buffer in model.module.buffers()} == {DEVICE}
    model.release()
    assert {buffer.device.type for buffer in model.module.buffers()} == {"cpu"} and same(model.module.runs, runs + 1)
    assert same(run(model).cpu(), expected)
    model.close()


def test_nothing_is_left_on_the_device(fake):
    before, pinned = fake.memory("used"), fake.get("pinned")
    model, _ = on_device(stack, fraction=0.5, pins=1.0)
    for _ in range(100):  # pins come from a thread of their own
        run(model)
        if fake.get("pinned") > pinned and model.pins.used:
            break
        time.sleep(0.01)
    assert fake.memory("used") > before and fake.get("pinned") > pinned
    model.close()
    del model
    gc.collect()
    assert (fake.memory("used"), fake.get("pinned")) == (before, pinned)


def left(fake, wanted):
    """The bytes that stay in use. A thread that has just ended a transfer may hold its memory for a moment more."""
    for _ in range(200):
        gc.collect()
        if fake.memory("used") == wanted:
            break
        time.sleep(0.01)
    return fake.memory("used")


@pytest.mark.parametrize("vbar", ["software", "aimdo"])
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_out_of_memory_at_every_allocation(fake, vbar, fraction):
    """The plain bits or an error, and the next forward is right."""
    expected = case(stack, torch.float32, torch.float32)[1]
    before = fake.memory("used")
    at, failures = 1, 0
    while True:
        model, _ = on_device(stack, vbar=vbar, fraction=fraction, pins=0.5)
        data = model.module.input().to(DEVICE)
        first = fake.memory("allocations")
        fake.fail_at(at)
        try:
            with torch.no_grad():
                out = model(data)
        except torch.OutOfMemoryError:
            failures += 1
        else:
            assert same(out.cpu(), expected)
            del out
        ended = fake.memory("allocations") - first < at
        fake.fail_at(0)
        assert same(run(model).cpu(), expected)
        model.close()
        del model, data
        assert left(fake, before) == before
        if ended:
            break
        at += 1
    assert at > 20, "a forward allocates its activations at least"


# -- each wait alone is taken away


class Without(StreamBackend):
    """A backend that leaves out one kind of wait."""

    def __init__(self, kind):
        super().__init__(DEVICE)
        self.kind = kind

    def wait(self, event, stream):
        if self.kind != ("main for side" if stream is None else "side for main"):
            super().wait(event, stream)


@pytest.mark.parametrize("kind", ["main for side", "side for main"])
def test_a_missing_wait_is_noticed(fake, kind):
    outputs = []
    for backend in (StreamBackend(DEVICE), Without(kind)):
        model, expected = on_device(stack, backend=backend, fraction=0.0, pins=0.5)
        outputs.append([same(run(model).cpu(), expected) for _ in range(2)])
        outputs[-1].append(not fake.hazards())
        torch.cuda.synchronize()
        model.close()
        fake.hazards()
    assert all(outputs[0]) and not all(outputs[1]), outputs
