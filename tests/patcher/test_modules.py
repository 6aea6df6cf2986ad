"""Modules of every make: how they are built, how they hold their weights, in which order they run."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kit.nets import AnyLinear, budget, dynamic, plain, quantise, random_state, same, write
from kit.sim_device import SimDevice
from spillway.ops.files.source import StateDict
from spillway.patcher.attach import Unsupported

WIDTH = 64
DEVICES = {"cpu": lambda: None, "deferred": SimDevice, "overtaking": lambda: SimDevice(eager="some")}


class Branches(torch.nn.Module):
    """Runs other layers, in another order, from call to call."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(AnyLinear(WIDTH) for _ in range(8))

    def forward(self, x, order=range(8)):
        for index in order:
            x = torch.tanh(self.layers[index](x))
        return x


class Nested(torch.nn.Module):
    """Every level has parameters of its own and uses them before, between and after its children."""

    def __init__(self, depth=5):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.empty(WIDTH))
        self.shift = torch.nn.Parameter(torch.empty(WIDTH))
        self.inner = Nested(depth - 1) if depth else AnyLinear(WIDTH)
        self.after = AnyLinear(WIDTH)

    def forward(self, x):
        x = self.inner(x * self.gain.float())
        return torch.tanh(self.after(x + self.shift.float()))


class Lists(torch.nn.Module):
    """Parameters in containers, which cannot be called."""

    def __init__(self):
        super().__init__()
        self.scales = torch.nn.ParameterList(torch.empty(WIDTH) for _ in range(3))
        self.named = torch.nn.ParameterDict({"shift": torch.empty(WIDTH)})
        self.deep = torch.nn.ModuleDict({"list": torch.nn.ParameterList([torch.empty(WIDTH)])})

    def forward(self, x):
        for scale in self.scales:
            x = x * scale.float()
        return x + self.named["shift"].float() + self.deep["list"][0].float()


class Attention(torch.nn.Module):
    """Stock attention reads its projection's weight without calling it."""

    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        x = x[None]
        return self.attention(x, x, x)[0]


class Encoder(torch.nn.Module):
    """Stock transformer layers have a fast path that reads all their weights at once."""

    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.0)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)
        self.eval()

    def forward(self, x):
        return self.encoder(x[None])


class Norms(torch.nn.Module):
    """Buffers of several dtypes that the file holds too."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.register_buffer("computed", torch.linspace(0, 1, WIDTH), persistent=False)
        self.eval()

    def forward(self, x):
        return self.linear(self.norm(x)) + self.computed


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.up = torch.nn.ConvTranspose2d(8, 3, 3)
        self.norm = torch.nn.GroupNorm(1, 3)

    def forward(self, x):
        return self.norm(self.up(self.conv(x.reshape(1, 1, 8, -1).expand(-1, 3, -1, -1))))


SHAPES = [Branches, Nested, Lists, Attention, Encoder, Norms, Convolutions]


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


@pytest.fixture(params=[None, 0.6, 0.0])
def fraction(request):
    return request.param


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def x():
    return torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)


def limit(model, fraction):
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction)))
    return model


@pytest.mark.parametrize("build", SHAPES)
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16])
def test_parity_with_the_plain_module(tmp_path, device, fraction, build, file_dtype):
    state = write(tmp_path / "m.safetensors", build(), file_dtype)
    reference = plain(build, state, torch.float32)
    model = limit(dynamic(build, tmp_path / "m.safetensors", device=device), fraction)
    for _ in range(3):
        assert same(model(x()), reference(x()))


@pytest.mark.parametrize("build", SHAPES)
def test_parity_when_everything_is_patched(tmp_path, device, fraction, build):
    state = write(tmp_path / "m.safetensors", build())
    reference = plain(build, state, torch.float32)
    model = limit(dynamic(build, tmp_path / "m.safetensors", device=device), fraction)
    model.set_patches({key: lambda weight: weight * 1.25 for key, _ in reference.named_parameters()})
    for parameter in reference.parameters():
        parameter.data *= 1.25
    for _ in range(3):
        assert same(model(x()), reference(x()))


@pytest.mark.parametrize("build", [Branches, Nested, Lists, Norms])
def test_parity_with_the_modules_own_parameters_as_source(device, fraction, build):
    module = plain(build, random_state(build(), torch.float32), torch.float32)
    expected = module(x())
    model = limit(dynamic(lambda: module, None, device=device), fraction)
    for _ in range(3):
        assert same(model(x()), expected)


def test_any_order_of_execution(tmp_path, device, fraction):
    state = write(tmp_path / "m.safetensors", Branches(), torch.bfloat16)
    reference = plain(Branches, state, torch.float32)
    model = limit(dynamic(Branches, tmp_path / "m.safetensors", device=device), fraction)
    orders = [range(8), range(7, -1, -1), [0, 2, 4], [0, 1, 0, 1, 5, 5, 5], [7], [0, 3, 6, 1, 4, 7, 2, 5], range(8)]
    for order in orders * 2:
        assert same(model(x(), order), reference(x(), order))


def test_a_module_used_twice_in_a_step(tmp_path, device, fraction):
    order = [0, 1, 2, 1, 0, 3, 1, 1, 4]
    state = write(tmp_path / "m.safetensors", Branches())
    reference = plain(Branches, state, torch.float32)
    model = limit(dynamic(Branches, tmp_path / "m.safetensors", device=device), fraction)
    for _ in range(4):
        assert same(model(x(), order), reference(x(), order))


def test_a_module_that_is_in_two_places(tmp_path, device, fraction):
    def build():
        shared = AnyLinear(WIDTH)
        return torch.nn.Sequential(shared, AnyLinear(WIDTH), shared)

    state = write(tmp_path / "m.safetensors", torch.nn.Sequential(AnyLinear(WIDTH), AnyLinear(WIDTH)))
    model = limit(dynamic(build, tmp_path / "m.safetensors", device=device), fraction)
    reference = plain(build, {**state, "2.weight": state["0.weight"], "2.bias": state["0.bias"]}, torch.float32)
    for _ in range(3):
        assert same(model(x()), reference(x()))


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(2 * WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed((x.abs() * WIDTH).long()))


@pytest.mark.parametrize("keys", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
def test_a_tied_parameter_is_found_under_any_of_its_names(tmp_path, device, fraction, keys):
    weight = torch.randn(2 * WIDTH, WIDTH)
    save_file({key: weight.clone() for key in keys}, tmp_path / "m.safetensors")
    model = limit(dynamic(Tied, tmp_path / "m.safetensors", device=device), fraction)
    reference = Tied()
    reference.embed.weight.data.copy_(weight)
    for _ in range(3):
        assert same(model(x()), reference(x()))


def test_a_weight_that_another_module_reads_is_readable_on_the_cpu(tmp_path):
    class Borrowing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(2 * WIDTH, WIDTH)
            self.norm = torch.nn.LayerNorm(WIDTH)

        def forward(self, x):
            x = self.norm(self.embed((x.abs() * WIDTH).long()))
            return F.linear(x, self.embed.weight)

    state = write(tmp_path / "m.safetensors", Borrowing())
    reference = plain(Borrowing, state, torch.float32)
    model = dynamic(Borrowing, tmp_path / "m.safetensors", vram_bytes=0)
    for _ in range(2):
        assert same(model(x()), reference(x()))
    assert same(model.module.embed.weight, state["embed.weight"])


def test_a_quantised_weight_stays_quantised(device, fraction):
    class Quantised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(AnyLinear(WIDTH) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    class Layer(AnyLinear):
        def forward(self, x):
            return F.linear(x, self.weight.dequantise(), self.bias)

    def build():
        module = Quantised()
        module.layers = torch.nn.ModuleList(Layer(WIDTH) for _ in range(4))
        return module

    state = random_state(build(), torch.float32)
    quantised = {key: quantise(value) if value.dim() == 2 else value for key, value in state.items()}
    model = limit(dynamic(build, StateDict(quantised), device=device), fraction)
    dequantised = {key: value.dequantise() if value.dim() == 2 else value for key, value in quantised.items()}
    reference = plain(Quantised, dequantised, torch.float32)
    for _ in range(3):
        assert same(model(x()), reference(x()))
    assert model.total_bytes < 4 * WIDTH * WIDTH * 4


def test_a_patch_that_gives_a_weight_another_shape(tmp_path, device, fraction):
    class Widen:
        shape = (WIDTH, 2 * WIDTH)

        def __call__(self, weight):
            return torch.cat([weight, weight.flip(0)], 1)

    state = write(tmp_path / "m.safetensors", AnyLinear(WIDTH))
    model = limit(dynamic(lambda: AnyLinear(WIDTH), tmp_path / "m.safetensors", device=device), fraction)
    reference = plain(lambda: AnyLinear(WIDTH), state, torch.float32)
    assert same(model(x()), reference(x()))
    for _ in range(2):
        model.set_patches({"weight": Widen()})
        wide = torch.cat([x(), x()], 1)
        for _ in range(2):
            assert same(model(wide), F.linear(wide, Widen()(state["weight"]), state["bias"]))
        model.set_patches({})
        for _ in range(2):
            assert same(model(x()), reference(x()))


@pytest.mark.parametrize("build", [lambda: torch.nn.LSTM(4, 4), lambda: torch.nn.Sequential(torch.nn.GRU(4, 4))])
def test_modules_that_keep_their_own_list_of_weights_are_refused(build):
    with pytest.raises(Unsupported, match=r"(LSTM|GRU).*own list.*loader"):
        dynamic(build, None)


def test_a_tensor_class_that_cannot_be_laid_out_is_refused_with_its_key():
    class Odd(torch.Tensor):
        pass

    module = AnyLinear(WIDTH)
    module.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH).as_subclass(Odd), requires_grad=False)
    with pytest.raises(Unsupported, match=r"'weight' is a Odd.*Load this model with its own loader"):
        dynamic(lambda: module, None)


def test_a_model_without_parameters_is_just_called():
    model = dynamic(lambda: torch.nn.Sequential(torch.nn.Tanh()), None)
    assert same(model(x()), torch.tanh(x()))
    assert model.total_bytes == model.resident_bytes == model.free() == 0
    model.close()
