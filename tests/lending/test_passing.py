"""On a CPU the first use of a weight that is merely cast takes no memory that stays: much is used only once."""

from typing import ClassVar

import pytest
import torch

from kit.nets import AnyLinear, Stack, dynamic, same, write
from spillway.ops.device.backend import CpuBackend
from spillway.ops.lending.host_caster import HostCaster
from spillway.ops.vbar import software
from spillway.patcher.preload import load_now

DEPTH, WIDTH = 6, 64


class Watched(AnyLinear):
    """Notes where its weight lies while it is used."""

    places: ClassVar[list] = []

    def forward(self, x):
        self.places.append(self.weight.data_ptr())
        return super().forward(x)


def build():
    return Stack(DEPTH, WIDTH, Watched)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, build(), torch.bfloat16)
    return path


@pytest.fixture
def model(path):
    model = dynamic(build, path, torch.float32)
    yield model
    model.close()


def expected(path, x):
    """What the plain module computes, its weights cast as the model is loaded."""
    from safetensors.torch import load_file

    module = build()
    module.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    with torch.inference_mode():
        return module(x)


def run(model):
    with torch.inference_mode():
        return model(model.module.input())


def allocated(model):
    return sum(one.memory.nbytes for one in model.residency.vbar.slices if one.memory is not None)


def test_the_second_use_is_what_stays(model, path):
    wanted, seen = expected(path, model.module.input()), Watched.places
    seen.clear()
    assert same(run(model), wanted)
    assert allocated(model) == 0 and len(set(seen)) == 1  # all of them in the same memory, one after the other
    assert model.residency.caster.scratch.idle_bytes() == 0  # which went back as the forward ended
    assert model.resident_bytes == 0  # what holds no memory does not count as held
    assert same(run(model), wanted)
    assert model.resident_bytes >= allocated(model) >= DEPTH * WIDTH * WIDTH * 4
    hits = model.ledger.counters.hits
    seen.clear()
    assert same(run(model), wanted)
    assert model.ledger.counters.hits == hits + DEPTH and len(set(seen)) == DEPTH
    assert model.ledger.counters.misses == 0


def test_what_never_stays_is_made_in_the_same_memory_at_each_use(path):
    model = dynamic(build, path, torch.float32, vram_bytes=0)
    wanted, seen = expected(path, model.module.input()), Watched.places
    seen.clear()
    for step in range(3):
        assert same(run(model), wanted)
        assert len(set(seen[step * DEPTH :])) == 1 and allocated(model) == 0
    assert model.residency.caster.scratch.idle_bytes() == 0  # nothing counts it, so it goes as a forward ends
    model.close()


def test_the_second_use_is_what_stays_where_the_first_has_shown_another_layout(path):
    class Backwards(Stack):
        def forward(self, x):
            for layer in reversed(self.layers):
                x = torch.tanh(x + layer(x))
            return x

    model = dynamic(lambda: Backwards(DEPTH, WIDTH, Watched), path, torch.float32, vram_bytes=DEPTH * WIDTH * WIDTH * 2)
    run(model)
    run(model)
    assert any("laid out anew" in words for words in model.ledger.decisions)
    assert model.resident_bytes >= WIDTH * WIDTH * 4
    model.close()


def test_what_its_model_gave_back_passes_once_more(model, path):
    wanted = expected(path, model.module.input())
    for _ in range(2):
        assert same(run(model), wanted) and allocated(model) == 0
        model.release()


@pytest.mark.parametrize("budget", [None, 1 << 30])
def test_memory_is_asked_for_when_it_is_taken(path, budget, monkeypatch):
    """The first use has found room for each bundle, one by one. There is room for a third of them."""
    policy = {} if budget is None else {"vram_bytes": budget}
    model = dynamic(build, path, torch.float32, headroom_bytes=1 << 20, **policy)
    wanted, room = expected(path, model.module.input()), model.total_bytes // 3

    def memory(_):
        taken = 0 if model.residency is None else allocated(model)
        return (1 << 20) + room - taken, (1 << 20) + room

    monkeypatch.setattr(CpuBackend, "memory", memory)
    monkeypatch.setattr(software, "POLL_SECONDS", 0.0)
    software._devices.clear()
    for _ in range(4):
        assert same(run(model), wanted)
        assert allocated(model) <= room
    assert allocated(model) > 0
    model.close()
    software._devices.clear()


def test_an_evicted_bundle_is_used_once_more_before_it_stays(model, path):
    wanted = expected(path, model.module.input())
    for _ in range(2):
        run(model)
    model.free()
    assert same(run(model), wanted) and allocated(model) == 0
    assert same(run(model), wanted) and allocated(model) > 0


def test_what_is_loaded_ahead_stays_at_once(model):
    load_now(model)
    assert allocated(model) >= DEPTH * WIDTH * WIDTH * 4
    bytes_loaded = model.ledger.counters.bytes_loaded
    run(model)
    assert model.ledger.counters.bytes_loaded == bytes_loaded


def test_a_patched_weight_stays_at_once(model, path):
    model.set_patches({f"layers.{place}.weight": lambda weight: weight * 2 for place in range(DEPTH)})
    run(model)
    assert allocated(model) >= DEPTH * WIDTH * WIDTH * 4


def test_weights_that_a_gradient_needs_are_left_alone(model, path):
    from safetensors.torch import load_file

    plain = build()
    plain.load_state_dict({key: tensor.float() for key, tensor in load_file(path).items()})
    x = model.module.input().requires_grad_()
    model(x).sum().backward()
    other = model.module.input().requires_grad_()
    plain.requires_grad_(False)(other).sum().backward()
    assert torch.equal(x.grad, other.grad)


class Nested(AnyLinear):
    """Calls another layer while its own weights are lent."""

    def __init__(self, width):
        super().__init__(width)
        self.inner = AnyLinear(width)

    def forward(self, x):
        return super().forward(self.inner(x))


def test_loans_within_loans_have_memory_of_their_own(tmp_path):
    def nested():
        return Stack(2, WIDTH, Nested)

    write(tmp_path / "n.safetensors", nested(), torch.bfloat16)
    from safetensors.torch import load_file

    module = nested()
    module.load_state_dict({key: tensor.float() for key, tensor in load_file(tmp_path / "n.safetensors").items()})
    model = dynamic(nested, tmp_path / "n.safetensors", torch.float32)
    with torch.inference_mode():
        wanted = module(module.input())
    for _ in range(3):
        assert same(run(model), wanted)
    model.close()


def test_a_use_that_fails_gives_its_memory_back(model, path, monkeypatch):
    make = HostCaster.fill
    calls = []

    def failing(self, bundle, source, views):
        calls.append(bundle)
        if len(calls) == 2:
            raise ValueError("damaged")
        return make(self, bundle, source, views)

    monkeypatch.setattr(HostCaster, "fill", failing)
    with pytest.raises(ValueError, match="damaged"):
        run(model)
    assert model.residency.caster.scratch.idle_bytes() <= calls[0].nbytes  # one block, lent to both
    assert same(run(model), expected(path, model.module.input()))
