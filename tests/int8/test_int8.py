"""INT8 weights: the error of a product, what no kernel takes, and residency that changes nothing."""

import gc
from collections import Counter

import pytest
import torch

from kit.nets import Stack, budget, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.ops.gather import gathered_bytes, interpret_gathered_like
from spillway.ops.int8 import linear as kernels
from spillway.ops.int8.linear import dequantise_rows, group_count, int8_linear, quantise_rows
from spillway.ops.int8.measure import measure
from spillway.ops.int8.weight import Int8Weight
from spillway.patcher.int8_layers import Int8Layers
from spillway.patcher.quantise_now import quantise_now

DEPTH = 8
ERROR = 0.012  # of a product of normal numbers
NEAR = 0.1  # the layers of the model amplify an error of the first more than tenfold
DEVICES = {"cpu": lambda: None, "deferred": SimDevice, "overtaking": lambda: SimDevice(eager="some")}


class Linear(torch.nn.Linear):
    """Gives its weight to `linear`, as the core's layers do."""

    def __init__(self, width):
        super().__init__(width, width)


def build():
    return Stack(DEPTH, layer=Linear)


def every_linear(module, name, weight):
    return int(isinstance(module, torch.nn.Linear))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(tensor, groups=1):
    made = Int8Weight.template(tensor.shape, tensor.dtype, groups)
    buffer = torch.zeros(gathered_bytes([made]), dtype=torch.uint8)
    (view,) = interpret_gathered_like([made], buffer)
    view.quantise_(tensor)
    return view


def relative(result, wanted):
    return float((result.double() - wanted).norm() / wanted.norm())


# -- products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [256, 1024, 3072, 12288])
def test_error_on_normal_numbers(columns, dtype):
    x, weight, bias = normal(256, columns, dtype=dtype), normal(256, columns, seed=1, dtype=dtype), normal(256, seed=2)
    made = weight_of(weight, group_count(columns, "cpu"))
    wanted = x.double() @ weight.double().t()
    error = relative(torch.nn.functional.linear(x, made).float(), wanted)
    assert 0.005 < error < ERROR  # it is INT8, and no worse
    with_bias = torch.nn.functional.linear(x, made, bias.to(dtype)).double()
    assert relative(with_bias, wanted + bias.to(dtype).double()) < ERROR


def test_a_row_has_one_scale_where_other_kernels_multiply():
    assert group_count(12288, "cuda") == 1
    assert group_count(12288, "cpu") == 6
    assert group_count(4099, "cpu") == 1  # a prime number cannot be divided


@pytest.mark.parametrize("shape", [(1, 64), (3, 17), (2, 5, 64), (0, 64), (1, 1, 1, 40), (64,)])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_any_shape(shape, rows):
    x, weight = normal(*shape), normal(rows, shape[-1], seed=1)
    made = weight_of(weight)
    result = torch.nn.functional.linear(x, made)
    wanted = torch.nn.functional.linear(x.double(), made.dequantize().double())
    assert result.shape == wanted.shape and result.dtype == x.dtype
    bound = 0.02 * x.norm(dim=-1, keepdim=True) * weight.norm(dim=-1)
    assert ((result - wanted).abs() <= bound).all()


def test_much_is_multiplied_in_parts(monkeypatch):
    x, made = normal(300, 64), weight_of(normal(40, 64, seed=1))
    whole = torch.nn.functional.linear(x, made)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 32)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    assert torch.equal(torch.nn.functional.linear(x, made), whole)


def test_without_a_kernel_the_weight_is_dequantised(monkeypatch):
    x, bias = normal(8, 64), normal(40, seed=3)
    made = weight_of(normal(40, 64, seed=1))
    monkeypatch.setattr(kernels, "has_int_mm", lambda *_: False)
    wanted = torch.nn.functional.linear(x, made.dequantize(), bias)
    assert torch.equal(torch.nn.functional.linear(x, made, bias), wanted)


def test_a_kernel_of_a_library_is_used_for_one_scale_a_row(monkeypatch):
    calls = []

    def kernel(x, qdata, scale, bias):
        calls.append(qdata.shape)
        return torch.nn.functional.linear(x, dequantise_rows(qdata, scale, x.dtype), bias)

    monkeypatch.setitem(kernels._kernels, "cpu", kernel)
    x = normal(2, 3, 64)
    assert torch.nn.functional.linear(x, weight_of(normal(40, 64))).shape == (2, 3, 40)
    assert calls == [(40, 64)]
    torch.nn.functional.linear(x, weight_of(normal(40, 64), groups=2))
    assert len(calls) == 1


def test_zeros_and_what_is_no_number():
    weight = normal(16, 64)
    weight[3] = 0
    made = weight_of(weight)
    x = normal(4, 64)
    x[1] = 0
    x[2, 5] = float("nan")
    x[3, 5] = float("inf")
    result = torch.nn.functional.linear(x, made)
    assert not result[0, 3] and not result[1].any()
    assert torch.isfinite(result[:2]).all()
    assert not torch.isfinite(result[2]).any()
    assert not torch.isfinite(result[3][torch.arange(16) != 3]).any()


# -- the tensor


def test_other_operations_get_the_dequantised_weight():
    tensor = normal(16, 64)
    made = weight_of(tensor)
    assert torch.equal(made + 1, made.dequantize() + 1)
    assert torch.equal(made.t() @ made, made.dequantize().t() @ made.dequantize())
    assert torch.equal(made[2:5], made.dequantize()[2:5])
    with pytest.raises(RuntimeError, match="INT8 weight"):
        made.add_(1)
    assert "Int8Weight" in repr(made)


def test_another_dtype_keeps_the_bits():
    made = weight_of(normal(16, 64))
    half = made.to(torch.bfloat16)
    assert isinstance(half, Int8Weight) and half.dtype == torch.bfloat16
    assert torch.equal(half.qdata, made.qdata)
    assert torch.nn.functional.linear(normal(2, 64, dtype=torch.bfloat16), half).dtype == torch.bfloat16


def test_a_branch_is_added_exactly():
    weight, down, up = normal(48, 64), normal(4, 64, seed=5), normal(48, 4, seed=6)
    template = Int8Weight.template(weight.shape, torch.float32, 1, rank=4)
    (view,) = interpret_gathered_like([template], torch.zeros(gathered_bytes([template]), dtype=torch.uint8))
    view.quantise_(weight)
    view.down.copy_(down)
    view.up.copy_(up)
    assert view.rank == 4
    plainly = weight_of(weight)
    torch.testing.assert_close(view.dequantize(), plainly.dequantize() + up @ down)
    x = normal(5, 64, seed=7)
    torch.testing.assert_close(
        torch.nn.functional.linear(x, view), torch.nn.functional.linear(x, plainly) + x @ down.t() @ up.t()
    )


def test_fp8_and_int8_sources():
    tensor = normal(16, 64)
    small = tensor.to(torch.float8_e4m3fn)
    assert torch.equal(weight_of(small).qdata, weight_of(small.float()).qdata)
    made = weight_of(tensor)
    again = weight_of(made)  # has one scale a row: taken as it is
    assert torch.equal(again.qdata, made.qdata) and torch.equal(again.scale, made.scale)


# -- in a model


def int8_model(tmp_path, device=None, fraction=None, pins=2.0, dtype=torch.float32, **policy):
    state = write(tmp_path / "m.safetensors", build(), dtype)
    model = dynamic(build, tmp_path / "m.safetensors", dtype, device=device, int8=every_linear, **policy)
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction), pinned_bytes=budget(model, pins)))
    return model, state


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


def run(model):
    return model(model.module.input())


@pytest.mark.parametrize("pins", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("fraction", [None, 0.6, 0.0])
def test_the_same_bits_at_any_residency(tmp_path, device, fraction, pins):
    model, state = int8_model(tmp_path, device, fraction, pins)
    wanted = run(int8_model(tmp_path, None, None)[0])
    assert relative(wanted, run_plain(state).double()) < NEAR
    assert not same(wanted, run_plain(state))
    for _ in range(3):
        assert same(run(model), wanted)
    if pins == 2.0:
        assert model.ledger.counters.quantised == DEPTH  # once, wherever it stays


def run_plain(state, patches=()):
    module = plain(build, state, torch.float32)
    for key, patch in dict(patches).items():
        parameter = module.get_parameter(key)
        parameter.data = patch(parameter.data)
    return module(module.input())


@pytest.mark.parametrize("fraction", [None, 0.0])
def test_a_finished_form_takes_a_quarter_of_fp32(tmp_path, device, fraction):
    model, state = int8_model(tmp_path, device, fraction)
    run(model)
    run(model)
    assert model.total_bytes < 0.35 * sum(tensor.nbytes for tensor in state.values())
    before = model.ledger.counters.bytes_streamed
    run(model)
    streamed = model.ledger.counters.bytes_streamed - before
    if fraction == 0.0 and not model.backend.in_place:
        assert streamed == model.total_bytes


def test_quantising_ahead(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.5)
    told = []
    assert quantise_now(model, lambda done, total: told.append((done, total))) == DEPTH
    assert told[0] == (0, DEPTH) and told[-1] == (DEPTH, DEPTH)
    assert quantise_now(model) == 0
    run(model)
    assert model.ledger.counters.quantised == DEPTH


def test_quantising_ahead_stops_where_nothing_can_stay(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.0, 0.0)
    assert quantise_now(model) == 1
    assert model.resident_bytes == model.pinned_bytes == 0


def test_quantising_ahead_interrupted(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.5)
    wanted = run(int8_model(tmp_path)[0])

    def progress(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise_now(model, progress)
    assert not any(bundle.loan for bundle in model.bundles)
    assert same(run(model), wanted)
    assert model.ledger.counters.quantised == DEPTH


class Merged:
    """A low-rank change, computed into the weight."""

    def __init__(self, rank=4, width=128):
        self.down, self.up = normal(rank, width, seed=8) * 0.1, normal(width, rank, seed=9) * 0.1

    def __call__(self, weight):
        return weight + self.up @ self.down


class Branch(Merged):
    """The same, beside the weight."""

    def __init__(self):
        super().__init__()
        self.rank = 4

    def low_rank(self, device):
        return self.down.to(device), self.up.to(device)


@pytest.mark.parametrize("kind", [Merged, Branch])
@pytest.mark.parametrize("fraction", [None, 0.5, 0.0])
def test_patches_are_computed_once_and_leave_no_trace(tmp_path, device, fraction, kind):
    model, state = int8_model(tmp_path, device, fraction)
    patches = {f"layers.{index}.weight": kind() for index in range(DEPTH)}
    without = run(model)
    model.set_patches(patches)
    first = run(model)
    made = model.ledger.counters.quantised
    assert same(run(model), first)
    assert same(run(model), first)
    # A branch makes bundles larger: they are laid out anew, once.
    assert model.ledger.counters.quantised == made
    assert relative(first, run_plain(state, patches).double()) < NEAR
    if fraction is None:
        assert all(resident for _, _, resident in model.residency())
    model.set_patches({})
    assert same(run(model), without)


def test_a_branch_is_closer_than_a_merge_that_rounds_badly(tmp_path):
    """One number that dwarfs the rest of its row takes the steps of all others."""

    class Spiked(Merged):
        def __init__(self):
            super().__init__()
            self.up, self.down = torch.zeros(128, 4), torch.zeros(4, 128)
            self.up[:, 0], self.down[0, 0] = 2.0, 2.0

    class SpikedBranch(Spiked):
        rank = 4

        def low_rank(self, device):
            return self.down, self.up

    errors = []
    key = "layers.0.weight"
    for kind in (Spiked, SpikedBranch):
        model, state = int8_model(tmp_path)
        model.set_patches({key: kind()})
        x = normal(4, 128)
        wanted = x.double() @ kind()(state[key]).double().t() + state["layers.0.bias"].double()
        errors.append(relative(model.module.layers[0](x), wanted))
    assert errors[1] < errors[0] / 3


def test_a_failing_patch_leaves_the_next_run_right(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.3)
    wanted = run(model)

    def fails(weight):
        raise ValueError("no")

    model.set_patches({"layers.3.weight": fails})
    with pytest.raises(ValueError, match="no"):
        run(model)
    assert not any(bundle.loan for bundle in model.bundles)
    model.set_patches({})
    assert same(run(model), wanted)


def test_nothing_stays_behind(tmp_path, device):
    model, _ = int8_model(tmp_path, device, 0.5)
    run(model)
    model.close()
    gc.collect()
    assert model.resident_bytes == model.pinned_bytes == 0
    assert type(model.module.layers[0]) is Linear
    assert model.module.layers[0].weight.dtype == torch.float32


# -- which layers, and whether it pays


@pytest.mark.parametrize(
    ("architecture", "name", "covered"),
    [
        ("Flux", "double_blocks.0.img_attn.qkv", True),
        ("Flux", "single_blocks.3.linear2", True),
        ("Flux", "double_blocks.0.img_mod.lin", False),
        ("Flux", "single_blocks.3.modulation.lin", False),
        ("Flux", "final_layer.adaLN_modulation.1", False),
        ("Flux", "img_in", False),
        ("Flux", "time_in.in_layer", False),
        ("Chroma", "distilled_guidance_layer.layers.0.in_layer", False),
        ("WanModel", "blocks.0.self_attn.q", True),
        ("WanModel", "blocks.0.ffn.0", True),
        ("WanModel", "text_embedding.0", False),
        ("WanModel", "time_projection.1", False),
        ("NextDiT", "layers.0.feed_forward.w1", True),
        ("NextDiT", "layers.0.adaLN_modulation.1", False),
        ("NextDiT", "cap_embedder.1", False),
        ("QwenImageTransformer2DModel", "transformer_blocks.0.attn.to_q", True),
        ("QwenImageTransformer2DModel", "transformer_blocks.0.img_mlp.net.0.proj", True),
        ("QwenImageTransformer2DModel", "transformer_blocks.0.img_mod.1", False),
        ("UNetModel", "input_blocks.1.1.transformer_blocks.0.attn1.to_q", True),
        ("UNetModel", "input_blocks.1.0.emb_layers.1", False),
        ("UNetModel", "time_embed.0", False),
        ("Unheard of", "blocks.7.mlp.fc1", True),
        ("Unheard of", "head", False),
    ],
)
def test_sensitive_layers(architecture, name, covered):
    layers = Int8Layers(architecture, "cpu", "diffusion_model.")
    assert layers.covers("diffusion_model." + name) is covered
    assert not layers.covers("text_model." + name)
    linear = torch.nn.Linear(128, 64)
    assert bool(layers(linear, "diffusion_model." + name, linear.weight)) is covered


def test_only_wide_linear_layers():
    layers = Int8Layers("Flux", "cpu")
    name = "double_blocks.0.img_mlp.0"
    for other in (torch.nn.Linear(32, 128), torch.nn.Linear(100, 128), torch.nn.Conv2d(128, 128, 1)):
        assert not layers(other, name, other.weight)
    norm = torch.nn.LayerNorm(128)
    assert not layers(norm, name, norm.weight)


def test_measurement():
    timing = measure(Counter({(256, 128): 3, (128, 128): 1}), torch.float32, torch.device("cpu"))
    assert [shape for shape, *_ in timing.shapes] == [(256, 128), (128, 128)]
    assert timing.gain > 0 and timing.wins is (timing.gain >= 1.05)
    assert "128->256" in timing.in_words() and f"{timing.gain:.2f}x" in timing.in_words()
    again = measure(Counter({(256, 128): 3, (128, 128): 1}), torch.float32, torch.device("cpu"))
    assert again == timing  # measured once


def test_quantising_by_rows_and_groups():
    tensor = normal(8, 64)
    for groups in (1, 2, 4):
        qdata, scale = quantise_rows(tensor, groups)
        assert qdata.dtype == torch.int8 and scale.shape == (8, groups)
        restored = dequantise_rows(qdata, scale, torch.float32)
        step = scale.repeat_interleave(64 // groups, 1)
        assert ((restored - tensor).abs() <= 0.5001 * step).all()
        assert relative(int8_linear(torch.eye(64), qdata, scale).t(), restored.double()) < 0.01
