"""On a CPU a weight is used where its file lies in memory, also where a bias beside it is cast."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kit.nets import dynamic, random_state, same


class Mixed(torch.nn.Module):
    """Layers whose weights the file has in the model's dtype, and their biases in another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(256, 256), torch.nn.Linear(256, 256)

    def forward(self, x):
        return self.second(torch.nn.functional.silu(self.first(x)))


@pytest.fixture
def state():
    state = random_state(Mixed(), torch.float32)
    return {key: tensor.bfloat16() if key.endswith("bias") else tensor for key, tensor in state.items()}


@pytest.fixture
def file(state, tmp_path):
    save_file(state, tmp_path / "mixed.safetensors")
    return tmp_path / "mixed.safetensors"


def expected(state, x, changed=lambda weight: weight):
    module = Mixed()
    module.load_state_dict({key: changed(tensor.float()) for key, tensor in state.items()})
    with torch.no_grad():
        return module(x)


def allocated(model):
    """The bytes that the VBAR's slices have taken."""
    return sum(one.memory.nbytes for one in model.residency.vbar.slices if one.memory is not None)


@pytest.mark.parametrize("budget", [None, 0])
def test_only_the_bias_is_copied(file, state, budget):
    model = dynamic(Mixed, file, vram_bytes=budget)
    seen = []
    model.module.first.register_forward_pre_hook(lambda module, _: seen.append((module.weight, module.bias)))
    x = torch.randn(3, 256)
    for _ in range(3):
        assert same(model(x), expected(state, x))
    bundle = model.by_key["first.weight"]
    assert bundle.in_place and allocated(model) == 0
    for weight, bias in seen:
        assert weight.data_ptr() == bundle.params[0].source.data_ptr() and bias.dtype == torch.float32


def test_a_patch_gets_memory_of_its_own_and_gives_it_back(file, state):
    model = dynamic(Mixed, file)
    x = torch.randn(3, 256)
    assert same(model(x), expected(state, x))
    model.set_patches({"first.weight": lambda weight: weight.mul_(1.5)})
    wanted = {**state, "first.weight": state["first.weight"] * 1.5}
    for _ in range(2):
        assert same(model(x), expected(wanted, x))
    assert allocated(model) >= state["first.weight"].nbytes and not model.by_key["first.weight"].in_place
    model.set_patches({})
    for _ in range(2):
        assert same(model(x), expected(state, x))
    assert allocated(model) == 0


def test_eviction_gives_the_cast_back(file, state):
    model = dynamic(Mixed, file)
    x = torch.randn(3, 256)
    model(x)
    model.free()
    assert model.by_key["first.weight"].views is None
    assert same(model(x), expected(state, x))


def test_a_model_of_casts_alone_is_not_used_in_place(state, tmp_path):
    """Tiny bundles, of which rounding up to whole blocks is the greater part."""
    save_file({key: tensor.bfloat16() for key, tensor in state.items()}, tmp_path / "cast.safetensors")
    model = dynamic(Mixed, tmp_path / "cast.safetensors")
    x = torch.randn(3, 256)
    cast = {key: tensor.bfloat16() for key, tensor in state.items()}
    assert same(model(x), expected(cast, x)) and not model.by_key["first.weight"].in_place


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(1.5),
        lambda weight: weight * 1.5,
        lambda weight: weight.t().mul_(1.5).t(),
        lambda weight: weight.t(),  # in the same memory, in another order
        lambda weight: weight.flip(0),
    ],
    ids=["in place", "new", "through a view", "transposed", "reversed"],
)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_whatever_a_patch_returns_is_the_weight(state, tmp_path, change, stored):
    state = {key: tensor.to(stored) for key, tensor in state.items()}
    save_file(state, tmp_path / "patched.safetensors")
    model = dynamic(Mixed, tmp_path / "patched.safetensors")
    model.set_patches({"first.weight": change})
    wanted = {**state, "first.weight": change(state["first.weight"].float().clone()).contiguous()}
    x = torch.randn(3, 256)
    for _ in range(2):
        assert same(model(x), expected(wanted, x))


def test_the_cast_is_an_ordinary_tensor_where_its_source_is(file):
    """It stays, and is used by training nodes too, whatever device some node has made the default."""
    model = dynamic(Mixed, file)
    with torch.inference_mode(), torch.device("meta"):
        weight, bias = model.by_key["first.weight"].where_it_lies()
    assert bias.device.type == "cpu" and not bias.is_inference() and not weight.is_inference()


def test_numbers_of_a_weight_in_parts_are_made_once(monkeypatch):
    from spillway.ops.lending import final_form

    made, source = [], torch.ones(4, 4)
    monkeypatch.setattr(final_form, "numbers_of", lambda tensor: made.append(1) or tensor.float())
    for stored in (torch.bfloat16, torch.float32):
        made.clear()
        view, param = torch.zeros(4, 4), SimpleNamespace(patch=lambda weight: weight * 2, compute_dtype=None)
        final_form._patch_into(view, param, source.to(stored).clone(), in_place=True)
        assert torch.equal(view, torch.full((4, 4), 2.0)) and len(made) <= 2
    blocks = SimpleNamespace()
    monkeypatch.setattr(final_form, "numbers_of", lambda _: made.append(1) or source.clone())
    monkeypatch.setattr(final_form, "stays_quantised", lambda _: False)
    made.clear()
    final_form._patch_into(torch.zeros(4, 4), param, blocks, in_place=True)
    assert len(made) == 1
