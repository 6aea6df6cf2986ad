"""Small models, their files, and the plain modules that the tests compare them with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from spillway.ops.files.disk_map import DiskMap
from spillway.ops.skip_init import skip_model_initialization
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

# Matrices this small gain nothing from a second thread, and lose much on a machine that is busy.
torch.set_num_threads(1)

# The same examples every time, so a test does not fail on some machines only.
steady = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class AnyLinear(torch.nn.Module):
    """Computes in float32 whatever its weights are stored in, so that fp8 weights have a forward too."""

    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, width))
        self.bias = torch.nn.Parameter(torch.empty(width))

    def forward(self, x):
        return F.linear(x, self.weight.float(), self.bias.float())


# Of the Stack in the file of the fixture `path`.
DEPTH = 8


class Stack(torch.nn.Module):
    """`depth` layers in a row, each of one bundle of about width * width elements."""

    def __init__(self, depth=12, width=128, layer=AnyLinear):
        super().__init__()
        self.width = width
        self.layers = torch.nn.ModuleList(layer(width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(x + layer(x))
        return x

    def input(self):
        return torch.linspace(-1, 1, 2 * self.width).view(2, self.width)


class Blocks(torch.nn.Module):
    """Stock layers of very different sizes, and a parameter of the root's own."""

    def __init__(self, depth=6, width=96):
        super().__init__()
        self.width = width
        self.embed = torch.nn.Embedding(50, width)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(width),
                torch.nn.Linear(width, 2 * width),
                torch.nn.GELU(),
                torch.nn.Linear(2 * width, width, bias=False),
            )
            for _ in range(depth)
        )
        self.conv = torch.nn.Conv1d(width, width, 3, padding=1)
        self.scale = torch.nn.Parameter(torch.empty(width))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.conv(x.transpose(1, 2)) * self.scale[:, None]

    def input(self):
        return torch.arange(24).view(2, 12) * 2


def random_state(module, dtype, seed=0):
    """Make tensors for parameters and buffers, scaled so that every dtype holds them and activations stay finite."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(tensor.shape, generator=generator) * 0.2).to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in module.state_dict().items()
    }


def write(path, module, dtype=torch.float32, seed=0):
    """Write a safetensors file of random weights for a module, and return what it holds."""
    state = random_state(module, dtype, seed)
    save_file(state, path)
    return state


def plain(build, state, dtype):
    """Build the module with `state` cast to `dtype`. A dynamic model must equal it bit for bit."""
    module = build().to(dtype).requires_grad_(False)
    module.load_state_dict({key: tensor.to(dtype) for key, tensor in state.items()}, assign=True)
    return module


def dynamic(
    build,
    source,
    dtype=torch.float32,
    policy=None,
    *,
    device=None,
    quantise=None,
    orders_file=None,
    sketch=False,
    **policy_fields,
):
    """Make a dynamic model of `source`: a path, a Source, or None for the module's own parameters.

    device: a simulated one, else the CPU. dtype: None leaves the module as it is built. quantise: which weights
    are quantised, and how. orders_file: keeps the order in which layers ran. sketch: as in DynamicModel.
    """
    if source is None:
        module = build()
    else:
        with skip_model_initialization():
            module = build() if dtype is None else build().to(dtype)
        source = source if hasattr(source, "keys") else DiskMap(source)
    policy = policy or Policy(**policy_fields)
    more = {"orders_file": orders_file, "sketch": sketch}
    return DynamicModel(module, source, "cpu", policy, quantise=quantise, backend=device, **more)


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def same(a, b):
    """Compare bit for bit, NaNs included."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def budget(model, fraction):
    """Count the bytes of a fraction of the model; None stays None."""
    return None if fraction is None else int(model.total_bytes * fraction)


class Scaled(torch.Tensor):
    """A quantised tensor as wrapper subclass: int8 codes and one scale per row."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes, scale, dtype=torch.float32):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, dtype=torch.float32):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts, dtype, outer_size, outer_stride):
        return Scaled(parts["codes"], parts["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].codes, args[0].scale, args[0].dtype)
        raise NotImplementedError(f"{func} on a quantised tensor")

    def dequantise(self):
        return self.codes.to(self.dtype) * self.scale[:, None]


def quantise(tensor):
    scale = tensor.abs().amax(1) / 127
    return Scaled((tensor / scale[:, None]).round().to(torch.int8), scale, tensor.dtype)
