"""Reads outside of a layer's call get the weight in the model's dtype, on the device, patched; each read is a loan."""

import copy

import pytest
import torch

from kit.nets import dynamic, random_state, same
from kit.sim_device import SimDevice
from spillway.ops.files.source import StateDict
from spillway.ops.lending.idle_weight import IdleWeight

DEVICES = {"cpu": lambda: None, "deferred": SimDevice, "overtaking": lambda: SimDevice(eager="some")}
DTYPES = {"in the file's dtype": torch.float32, "cast": torch.bfloat16}
BUDGETS = [None, 0]


class Reader(torch.nn.Module):
    """Uses weights of layers that it does not call, in every place that ComfyUI's architectures do so."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, 8)  # never called
        self.tied = torch.nn.Linear(8, 16, bias=False)
        self.norm = torch.nn.LayerNorm(8)
        self.pointwise = torch.nn.Linear(8, 8)  # its forward is somebody else's
        weight = self.pointwise
        self.pointwise.forward = lambda x: x @ weight.weight.t() + weight.bias

    def forward(self, x):
        x = x.to(self.tied.weight.dtype) + self.embedding.weight[: x.shape[0]]
        x = torch.nn.functional.layer_norm(x, self.norm.weight.shape, self.norm.weight, self.norm.bias)
        x = self.pointwise(self.pointwise(x))
        x = torch.cat([x, self.norm.bias.expand(2, -1)])
        return torch.nn.functional.linear(self.tied(x) @ self.tied.weight, self.tied.weight.reshape(16, 8))

    def input(self):
        return torch.linspace(-1, 1, 32).view(4, 8)


def gain(weight):
    return weight * 1.5


@pytest.fixture
def state():
    return random_state(Reader(), torch.float32)


def made(state, dtype=torch.float32, device=None, **policy):
    return dynamic(Reader, StateDict(state), dtype, device=device, **policy)


def expected(state, dtype, patched=True):
    module = Reader()
    for key, tensor in state.items():
        weight = tensor.to(dtype)
        module.get_parameter(key).data = gain(weight) if patched else weight
    return module(module.input())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_reads_get_the_final_form(device, dtype, budget, state):
    model = made(state, dtype, device(), vram_bytes=budget)
    for _ in range(2):
        assert same(model(model.module.input()), expected(state, dtype, patched=False))
    model.set_patches(dict.fromkeys(state, gain))
    for _ in range(3):
        assert same(model(model.module.input()), expected(state, dtype))
    model.set_patches({})
    assert same(model(model.module.input()), expected(state, dtype, patched=False))


@pytest.mark.parametrize("device", [DEVICES["cpu"], DEVICES["deferred"]], ids=["cpu", "device"])
def test_a_read_is_a_loan(device, state):
    """It counts where a layer's call would: what is resident moves no bytes, what is not is brought for that read."""
    resident, streamed = (made(state, torch.bfloat16, device(), vram_bytes=budget, prefetch=0) for budget in BUDGETS)
    for model in (resident, streamed):
        bundle = model.by_key["tied.weight"]
        weight = model.module.tied.weight
        assert isinstance(weight, IdleWeight) and (weight.shape, weight.dtype) == ((16, 8), torch.bfloat16)
        assert model.residency is None  # asking for shape and dtype prepares nothing
        assert same(weight + 0, state["tied.weight"].bfloat16())
        before = vars(model.ledger.counters).copy()
        assert same(weight.t() * 1, state["tied.weight"].bfloat16().t())
        gained = {name: value - before[name] for name, value in vars(model.ledger.counters).items()}
        assert (
            gained["reads"] == 1 and gained["faults"] + gained["misses"] == 1 and gained["hits"] == (model is resident)
        )
        assert bool(gained["bytes_streamed"]) == (model is streamed) and not gained["bytes_loaded"]
        assert bundle.loan is None and model.residency.is_resident(bundle) == (model is resident)


def test_reads_change_no_order(state):
    """A read in the middle of a step neither begins a step nor changes what is brought ahead."""
    model = made(state, device=SimDevice(), vram_bytes=0)
    for _ in range(3):
        model(model.module.input())
    order = [bundle.name for bundle in model.execution_order()]
    with model.caster.borrow(model.by_key["tied.weight"]):
        ahead, steps = list(model.caster.prefetched), model.ledger.counters.steps
        _ = model.module.embedding.weight + 1
        assert list(model.caster.prefetched) == [bundle for bundle in ahead if bundle.name != "embedding"]
        assert model.ledger.counters.steps == steps
    assert [bundle.name for bundle in model.execution_order()] == order


def test_an_evicted_weight_never_shows_in_what_was_read(state):
    """A view of an idle weight stays idle. What an op makes of it is memory of its own."""
    model = made(state, device=SimDevice())
    weight = model.module.embedding.weight
    views = [weight[2:4], weight.t(), weight.view(-1)[:8], weight.chunk(2)[1], weight.detach().expand(2, 16, 8)]
    results = [view + 0 for view in views]
    model.free()
    wanted = state["embedding.weight"]
    parts = [wanted[2:4], wanted.t(), wanted.view(-1)[:8], wanted.chunk(2)[1], wanted.expand(2, 16, 8)]
    for view, result, part in zip(views, results, parts, strict=True):
        assert same(result, part) and same(view * 1, part)
        assert isinstance(view, IdleWeight) and not isinstance(result, IdleWeight)
    model.release()
    assert all(same(view.to(torch.float64), part.double()) for view, part in zip(views, parts, strict=True))


def test_writes_go_into_the_source(state):
    model = made(state, torch.bfloat16, SimDevice())
    model(model.module.input())
    with torch.no_grad():
        model.module.tied.weight.mul_(2)
        model.module.tied.weight[3:5].t().fill_(1)
        model.module.norm.bias.copy_(model.module.norm.weight)
    wanted = state["tied.weight"]
    assert same(wanted[3], torch.ones(8)) and same(state["norm.bias"], state["norm.weight"])
    assert same(model.module.tied.weight + 0, wanted.bfloat16())
    assert same(model(model.module.input()), expected(state, torch.bfloat16, patched=False))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_copies_and_state_dicts_have_the_numbers_of_the_source(device, state, tmp_path):
    model = made(state, torch.bfloat16, device())
    model.set_patches(dict.fromkeys(state, gain))
    model(model.module.input())
    copied = copy.deepcopy(model.module)
    torch.save(model.module.tied.weight, tmp_path / "weight")
    for key, tensor in state.items():
        assert same(model.module.state_dict()[key], tensor) and type(copied.get_parameter(key)) is torch.nn.Parameter
        assert same(copied.get_parameter(key), tensor)
    assert same(torch.load(tmp_path / "weight"), state["tied.weight"])
    assert model.module.tied.weight.tolist() == gain(state["tied.weight"].bfloat16()).tolist()


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_module_that_is_moved_or_cast_keeps_its_idle_weights(device, state):
    model = made(state, torch.bfloat16, device())
    model(model.module.input())
    standing = [(parameter, parameter.dtype) for parameter in model.module.parameters()]
    model.module.to("cpu", torch.float64)
    after = list(model.module.parameters())
    assert all(now is one and now.dtype == dtype for now, (one, dtype) in zip(after, standing, strict=True))
    assert same(model(model.module.input()), expected(state, torch.bfloat16, patched=False))
    model.close()
    assert {parameter.dtype for parameter in model.module.double().parameters()} == {torch.float64}


def test_an_idle_weight_outlives_its_model(state):
    model = made(state, torch.bfloat16, SimDevice())
    kept = torch.nn.Parameter(model.module.tied.weight, requires_grad=False)
    model.close()
    assert same(kept * 1, state["tied.weight"].bfloat16()) and type(model.module.tied.weight) is torch.nn.Parameter
    assert not any(module._state_dict_hooks for module in model.module.modules())
