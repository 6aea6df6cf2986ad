"""What is raised during a step: nothing stays lent, and the next step is right."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from kit.nets import AnyLinear, Scaled, Stack, dynamic, plain, quantise, random_state, same, write
from kit.sim_device import SimDevice
from spillway.ops.files.disk_map import SourceError
from spillway.ops.files.source import StateDict
from spillway.ops.lending import repeat

DEPTH = 6
ALL = 1 << 40
DEVICES = {"cpu": lambda: None, "deferred": SimDevice, "overtaking": lambda: SimDevice(eager="some")}
BUDGETS = {"all resident": None, "part": 0.8, "none": 0.0}


class Fragile(AnyLinear):
    """Raises what it is told to, once, while its weights are lent."""

    def __init__(self, width):
        super().__init__(width)
        self.errors = []

    def forward(self, x):
        y = super().forward(x)
        if self.errors:
            raise self.errors.pop()
        return y


class FragileStack(Stack):
    """Raises before it has run anything, or between two layers."""

    def __init__(self):
        super().__init__(DEPTH, layer=Fragile)
        self.errors = []

    def forward(self, x):
        y = super().forward(x)
        if self.errors:
            raise self.errors.pop()
        return y


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


@pytest.fixture(params=BUDGETS.values(), ids=BUDGETS)
def fraction(request):
    return request.param


@pytest.fixture
def known(monkeypatch):
    """The layers of these tests count as pure, as torch's own and ComfyUI's do."""
    monkeypatch.setattr(repeat, "_pure_modules", {*repeat._pure_modules, "kit.nets", __name__})


class Run:
    """A dynamic model that casts its weights, beside the plain one."""

    def __init__(self, tmp_path, device, fraction, pinned_bytes=0, **policy):
        path = tmp_path / "m.safetensors"
        state = write(path, FragileStack())
        self.reference = plain(FragileStack, state, torch.bfloat16)
        self.model = dynamic(FragileStack, path, torch.bfloat16, device=device, pinned_bytes=pinned_bytes, **policy)
        if fraction is not None:
            self.model.set_policy(self.model.policy.with_changes(vram_bytes=int(self.model.total_bytes * fraction)))

    def is_right(self):
        x = self.reference.input()
        return same(self.model(x), self.reference(x))

    def nothing_is_lent(self):
        """What is lent cannot be evicted, and its module holds other parameters than its own."""
        self.model.free()
        params = [param for bundle in self.model.bundles for param in bundle.params]
        return self.model.resident_bytes == 0 and all(getattr(p.owner, p.attr) is p.idle for p in params)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_exception_in_a_layer_leaves_nothing_lent(tmp_path, device, fraction, error, steps_before):
    run = Run(tmp_path, device, fraction)
    for _ in range(steps_before):
        assert run.is_right()
    run.model.module.layers[3].errors = [error("in a layer")]
    with pytest.raises(error, match="in a layer"):
        run.is_right()
    assert run.nothing_is_lent()
    assert all(run.is_right() for _ in range(3))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("pinned_bytes", [0, ALL], ids=["no pins", "pins"])
def test_an_exception_in_a_patch_leaves_nothing_half_done(tmp_path, device, fraction, pinned_bytes, error):
    run = Run(tmp_path, device, fraction, pinned_bytes)
    assert run.is_right()
    errors = [error("in a patch")]

    def patch(weight):
        if errors:
            raise errors.pop()
        return weight * 2

    # The second parameter of a bundle: its first one has been patched when it raises.
    run.model.set_patches({"layers.3.weight": lambda weight: weight * 3, "layers.3.bias": patch})
    with pytest.raises(error, match="in a patch"):
        run.is_right()
    assert run.nothing_is_lent()
    layer = run.reference.layers[3]
    layer.weight.data, layer.bias.data = layer.weight * 3, layer.bias * 2
    assert all(run.is_right() for _ in range(3))


@pytest.mark.parametrize("make_error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_layer_that_is_out_of_memory_once_is_run_again(tmp_path, known, device, make_error):
    run = Run(tmp_path, device, None)
    assert run.is_right()
    held = run.model.resident_bytes
    run.model.module.layers[3].errors = [make_error("simulated: out of memory")]
    assert run.is_right()
    assert run.model.ledger.counters.retries == 1
    assert run.model.ledger.counters.evictions >= DEPTH - 1
    assert any("out of memory in 'layers.3'" in text and "headroom" in text for text in run.model.ledger.decisions)
    assert run.is_right() and run.model.resident_bytes == held  # and all comes back


def test_a_layer_that_stays_out_of_memory_raises_after_one_retry(tmp_path, known, device):
    run = Run(tmp_path, device, None)
    assert run.is_right()
    layer = run.model.module.layers[3]
    layer.errors = [torch.OutOfMemoryError("simulated")] * 9
    with pytest.raises(torch.OutOfMemoryError):
        run.is_right()
    assert len(layer.errors) == 7
    layer.errors.clear()
    assert run.nothing_is_lent()
    assert run.is_right()


def test_out_of_memory_with_nothing_to_evict_raises_at_once(tmp_path, known, device):
    write(tmp_path / "m.safetensors", FragileStack())
    model = dynamic(FragileStack, tmp_path / "m.safetensors", device=device, vram_bytes=0, prefetch=0)
    layer = model.module.layers[0]  # in the first forward: no buffer is held but that in use
    layer.errors = [torch.OutOfMemoryError("simulated")] * 2
    with pytest.raises(torch.OutOfMemoryError):
        model(model.module.input())
    assert len(layer.errors) == 1
    assert model.ledger.counters.retries == 0


def test_buffers_give_way_to_out_of_memory_as_weights_do(tmp_path, known):
    run = Run(tmp_path, SimDevice(), 0.0)
    assert run.is_right() and run.is_right()
    held = run.model.buffer_bytes
    assert held > 0
    run.model.module.layers[3].errors = [torch.OutOfMemoryError("simulated")]
    assert run.is_right()
    assert run.model.ledger.counters.retries == 1
    assert 0 < run.model.buffer_bytes <= held  # the layers after it


@pytest.mark.parametrize("make_error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_between_layers_makes_room_for_the_next_try_of_the_caller(tmp_path, known, device, make_error):
    run = Run(tmp_path, device, None)
    assert run.is_right()
    run.model.module.errors = [make_error("simulated")] * 2
    with pytest.raises(make_error, match="simulated"):
        run.is_right()
    assert len(run.model.module.errors) == 1, "a whole model is never run again"
    assert run.model.resident_bytes == 0 and run.model.ledger.counters.retries == 0
    assert any("out of memory: freed" in text for text in run.model.ledger.decisions)
    run.model.module.errors.clear()
    assert run.is_right()


class Interrupt(BaseException):
    """What ComfyUI raises to stop a run; no Exception, as KeyboardInterrupt is none."""


class Scarce(SimDevice):
    """Refuses one allocation or transfer of weights."""

    error: BaseException | None = None
    refuse = "empty"
    after = 0

    def _raise_next(self, what):
        if what == self.refuse and self.error is not None:
            self.after -= 1
            if self.after < 0:
                error, self.error = self.error, None
                raise error

    def empty(self, nbytes):
        self._raise_next("empty")
        return super().empty(nbytes)

    def host_empty(self, nbytes):
        self._raise_next("host_empty")
        return super().host_empty(nbytes)

    def copy(self, target, source, stream):
        self._raise_next("copy")
        super().copy(target, source, stream)


@pytest.mark.parametrize("refuse", ["empty", "host_empty", "copy"])
@pytest.mark.parametrize("pinned_bytes", [0, ALL], ids=["no pins", "pins"])
@pytest.mark.parametrize("make_error", [torch.OutOfMemoryError, Interrupt])
def test_weights_that_fail_to_come_leave_nothing_lent(tmp_path, fraction, refuse, pinned_bytes, make_error):
    device = Scarce()
    run = Run(tmp_path, device, fraction, pinned_bytes)
    for after in range(15):
        # Stale weights everywhere, so that there is something to bring, to form and to write back.
        run.model.set_patches({f"layers.{index}.weight": torch.neg for index in range(0, DEPTH, 2)})
        for layer in run.reference.layers[::2]:
            layer.weight.data.neg_()
        device.error, device.refuse, device.after = make_error("simulated"), refuse, after
        for _ in range(3):
            try:
                assert run.is_right()
            except (Interrupt, torch.OutOfMemoryError):
                assert device.error is None
        device.error = None
        assert run.is_right()
        assert run.nothing_is_lent()
        assert run.model.caster.arena.taken_bytes == run.model.caster.staging.taken_bytes == 0
        run.model.set_patches({})
        for layer in run.reference.layers[::2]:
            layer.weight.data.neg_()


class Unreadable(Scaled):
    """A quantised weight of which one reading fails, as a disk may."""

    errors: ClassVar[list] = []

    def __tensor_flatten__(self):
        if self.errors:
            raise self.errors.pop()
        return super().__tensor_flatten__()


class Dequantising(AnyLinear):
    def forward(self, x):
        return F.linear(x, self.weight.dequantise(), self.bias)


@pytest.mark.parametrize("pinned_bytes", [0, ALL], ids=["no pins", "pins"])
@pytest.mark.parametrize("make_error", [RuntimeError, Interrupt])
@pytest.mark.parametrize("step", [0, 1])
def test_a_source_that_fails_while_it_is_read(fraction, pinned_bytes, make_error, step):
    def build():
        return Stack(4, 64, Dequantising)

    state = random_state(build(), torch.float32)
    for index in range(4):
        key = f"layers.{index}.weight"
        quantised = quantise(state[key])
        state[key] = Unreadable(quantised.codes, quantised.scale)
    dequantised = {key: getattr(value, "dequantise", lambda value=value: value)() for key, value in state.items()}
    reference = plain(lambda: Stack(4, 64), dequantised, torch.float32)
    expected = reference(reference.input())
    device = SimDevice()
    model = dynamic(build, StateDict(state), device=device, pinned_bytes=pinned_bytes)
    if fraction is not None:
        model.set_policy(model.policy.with_changes(vram_bytes=int(model.total_bytes * fraction)))
    for number in range(4):
        Unreadable.errors[:] = [make_error("unreadable")] if number == step else []
        try:
            assert same(model(model.module.input()), expected)
        except (RuntimeError, Interrupt):
            assert number == step
    Unreadable.errors.clear()
    assert same(model(model.module.input()), expected)
    model.free()
    assert model.resident_bytes == 0


def test_a_weight_without_data_that_is_not_used_does_no_harm(tmp_path, device):
    """A look-ahead must not raise what only the use of a weight should raise."""

    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.unused, self.last = (AnyLinear(64) for _ in range(3))

        def forward(self, x, use=False):
            x = self.first(x)
            return self.last(self.unused(x) if use else x)

    module = Branches().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data.normal_()
    x = torch.ones(1, 64)
    expected = module(x)
    module.unused.to("meta")
    model = dynamic(lambda: module, None, device=device)
    assert same(model(x), expected)
    with pytest.raises(SourceError, match=r"'unused\.weight' \(\(64, 64\)\) is needed by AnyLinear 'unused'"):
        model(x, use=True)
    assert same(model(x), expected)
