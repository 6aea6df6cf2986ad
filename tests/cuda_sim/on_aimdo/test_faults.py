"""Every driver function that the engine can reach fails: once, twice, for ever; at the start, later, at the end.

Under each of them a run is right, or it raises an error that says what failed; afterwards nothing is left behind, and
the next run is right. Where the engine stepped down, the ledger says so, says why, and says what to do.
"""

from typing import NamedTuple

import pytest
import torch

from cuda_sim.aimdo import PAGE
from cuda_sim.sim import FOR_EVER, INVALID_VALUE, OUT_OF_MEMORY
from kit.nets import Stack, dynamic, plain, same, write
from spillway.ops.device.backend import DeviceError

ALL = 1 << 40
BUNDLE = 1024 * 1024 * 4 + 1024 * 4  # bytes

# What the ledger says where a function fails for ever: (what happened, what to do).
VBAR = ("comfy-aimdo's VBAR failed twice", "Load it again")
ADDRESSES = ("could not reserve", "Load it again")
SYNCHRONOUS = ("synchronous from now on", "Load the model again")
PAGEABLE = ("using pageable memory", "smaller pinned RAM budget")

# When a function is called by the run below.
START, STEPS, END = "start", "steps", "end"


class Fault(NamedTuple):
    """words: of the ledger; None where comfy-aimdo or the engine copes without a step down, or an error is raised."""

    function: str
    error: int
    called: tuple[str, ...]
    words: tuple[str, str] | None = None


FAULTS = [
    Fault("cuMemAddressReserve", OUT_OF_MEMORY, (START,), ADDRESSES),
    Fault("cuMemCreate", OUT_OF_MEMORY, (START, STEPS)),  # it takes that for a full device
    Fault("cuMemCreate", INVALID_VALUE, (START, STEPS), VBAR),
    Fault("cuMemMap", INVALID_VALUE, (START, STEPS), VBAR),
    Fault("cuMemSetAccess", INVALID_VALUE, (START, STEPS), VBAR),
    Fault("cuMemUnmap", INVALID_VALUE, (START, STEPS, END)),
    Fault("cuMemRelease", INVALID_VALUE, (START, STEPS, END)),
    Fault("cuMemAddressFree", INVALID_VALUE, (END,)),
    Fault("cuMemGetInfo", INVALID_VALUE, (START,)),
    Fault("cuMemHostRegister", OUT_OF_MEMORY, (START,), PAGEABLE),
    Fault("cuMemHostUnregister", INVALID_VALUE, (END,)),
    Fault("cuMemAllocAsync", OUT_OF_MEMORY, (START,)),
    Fault("cuMemcpyHtoDAsync", INVALID_VALUE, (START, STEPS), SYNCHRONOUS),
    Fault("cuMemcpyDtoHAsync", INVALID_VALUE, (START, STEPS), SYNCHRONOUS),
    Fault("cuStreamCreate", OUT_OF_MEMORY, (START,), SYNCHRONOUS),
    Fault("cuStreamWaitEvent", INVALID_VALUE, (START, STEPS), SYNCHRONOUS),
    Fault("cuEventCreate", OUT_OF_MEMORY, (START, STEPS), SYNCHRONOUS),
    Fault("cuEventRecord", INVALID_VALUE, (START, STEPS), SYNCHRONOUS),
    Fault("cuEventSynchronize", INVALID_VALUE, (START, STEPS), SYNCHRONOUS),
    Fault("cuEventQuery", INVALID_VALUE, (START, STEPS), SYNCHRONOUS),
    Fault("cuCtxSynchronize", INVALID_VALUE, (END,)),
]
# Words of a model that works with less than it had.
STEPS_DOWN = (VBAR, ADDRESSES, SYNCHRONOUS, PAGEABLE)
# (when, calls that succeed before, whether streams are deferred)
MODES = [(START, 0, True), (STEPS, 0, False), (END, 0, True), (START, 1, False), (STEPS, 1, True), (END, 1, False)]


def cases():
    """Every fault once, twice and for ever at the first call, whenever it is called; for ever also at the second."""
    for fault in FAULTS:
        for name, times in {"once": 1, "twice": 2, "for ever": FOR_EVER}.items():
            modes = MODES if times == FOR_EVER else MODES[:3]
            for when, after, deferred in (mode for mode in modes if mode[0] in fault.called):
                label = f"{fault.function}-{fault.error} {name} {when}{' later' if after else ''}"
                yield pytest.param(fault, times, when, after, deferred, id=label)


def small():
    """Nine bundles of 4 MiB, so that a page holds eight."""
    return Stack(9, 1024)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "m.safetensors"
    state = write(path, small())
    return path, {sign: run_plain(state, sign) for sign in (1, -1)}


def run_plain(state, sign):
    reference = plain(small, state, torch.float32)
    if sign < 0:
        for layer in reference.layers[::2]:
            layer.weight.data.neg_()
    return reference(reference.input())


class Run:
    """A model with something of everything: a page resident, the rest streamed, pins, patches, write-backs."""

    def __init__(self, machine, model_file, deferred):
        path, self.want = model_file
        self.machine = machine
        device = machine.make_device(deferred)
        self.model = dynamic(small, path, device=device, pinned_bytes=ALL, headroom_bytes=0)
        self.sign = 1

    def step(self, pages):
        """A forward with other patches than before and that many pages for it."""
        self.machine.leave_pages(pages)
        self.sign = -self.sign
        self.model.set_patches({f"layers.{i}.weight": torch.neg for i in range(0, 9, 2)} if self.sign < 0 else {})
        assert same(self.model(self.model.module.input()), self.want[self.sign]), "a wrong result"

    def errors(self, *pages):
        """What the steps raise; those that raise nothing are right."""
        raised = []
        for some in pages:
            try:
                self.step(some)
            except (RuntimeError, MemoryError) as error:
                raised.append(Raised(type(error), str(error)))
        return raised

    def close(self):
        """What closing it raises."""
        try:
            self.model.close()
            self.machine.clean()
        except RuntimeError as error:
            return [Raised(type(error), str(error))]
        return []


class Raised(NamedTuple):
    """An error without its frames, which would keep what they used."""

    kind: type
    text: str

    def is_clear(self):
        """It says what failed, in words that a user meets elsewhere too or that say what to do."""
        if self.kind is DeviceError:
            return "restart" in self.text.lower()
        return issubclass(self.kind, torch.OutOfMemoryError) and "out of memory" in self.text


# Bytes of what the driver does not take back: lost, and nobody above it can change that. comfy-aimdo asks once and
# forgets the page.
REFUSED = {
    "cuMemUnmap": PAGE,
    "cuMemRelease": PAGE,
    "cuMemHostUnregister": 9 * BUNDLE,
}


def check_losses(machine, function, failed):
    """Nothing was left behind but what the driver refused to take back; the next test counts from there."""
    machine.clean()
    left = {name: nbytes for name, nbytes in machine.left_behind().items() if nbytes}
    if function in ("cuMemUnmap", "cuMemAddressFree"):
        left.pop("reserved", None)  # addresses that something is mapped at, or that the driver keeps
    if function in ("cuMemUnmap", "cuMemRelease"):
        assert left.pop("handles", 0) <= failed
    most = REFUSED.get(function, 0) * failed
    assert sum(left.values()) <= most, f"left behind: {left}"
    machine.forget_losses()


@pytest.mark.parametrize(("fault", "times", "when", "after", "deferred"), list(cases()))
def test_a_failing_driver_function(machine, model_file, fault, times, when, after, deferred):
    run = Run(machine, model_file, deferred)
    if when != START:
        # A model that fits whole has no pins that could go.
        assert not run.errors(*((1, 1, 1) if fault.function == "cuMemHostUnregister" else (2, 2)))
    machine.driver.fail(fault.function, times, after=after, error=fault.error)
    raised = run.errors(1, 0, 2, 1) if when != END else run.close()
    failed = machine.driver.failed(fault.function)
    machine.driver.no_faults()
    decisions = " ".join(run.model.ledger.decisions)

    assert failed or after, "it was never called, so nothing was tested"
    assert all(error.is_clear() for error in raised), raised
    if fault.words is not None and times == FOR_EVER and when != END and failed:
        assert all(words in decisions for words in fault.words), decisions
        assert "other models are not affected" in decisions or fault.words is PAGEABLE
    if times == 1:
        assert not raised, "one failure must not be felt"
        assert not any(words[0] in decisions for words in STEPS_DOWN) or fault.function == "cuMemUnmap"

    if when == END:
        run = Run(machine, model_file, deferred)
    assert not run.errors(2, 2), "the next runs are not right"
    assert not run.close()
    check_losses(machine, fault.function, failed)


# Nothing more can be tried: (functions that fail for ever, what is said).
HOPELESS = {
    "no copies at all": (("cuMemcpyHtoDAsync", "cuMemcpyHtoD"), "cannot be copied to or from"),
    "copies and synchronising": (("cuMemcpyHtoDAsync", "cuCtxSynchronize"), "cannot be synchronised"),
    "events and synchronising": (("cuEventRecord", "cuCtxSynchronize"), "cannot be synchronised"),
}


@pytest.mark.parametrize("deferred", [True, False], ids=["deferred", "eager"])
@pytest.mark.parametrize(("functions", "said"), HOPELESS.values(), ids=HOPELESS)
def test_a_device_that_does_not_answer_is_said_and_the_next_run_is_right(
    machine, model_file, functions, said, deferred
):
    run = Run(machine, model_file, deferred)
    assert not run.errors(2, 2)
    for function in functions:
        machine.driver.fail(function, FOR_EVER)
    raised = run.errors(1, 0)
    assert len(raised) == 2 and all(error.kind is DeviceError and said in error.text for error in raised)
    machine.driver.no_faults()
    assert not run.errors(1, 2, 2)
    assert not run.close()
