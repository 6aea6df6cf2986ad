"""A card that has no memory: models at their published sizes run on it in seconds, by shapes, dtypes and devices alone.

Torch's FakeTensorMode refuses an operation on tensors of two devices, as a card would. `Reads` sees what it cannot: a
weight that leaves host memory by any other way than a loan.
"""

from contextlib import contextmanager

import comfy.model_management
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from spillway.ops.device.backend import Backend
from spillway.ops.gather import inner_tensors
from spillway.patcher import attach
from spillway.patcher.comfyui import model_state
from spillway.patcher.comfyui.patcher import DynamicModelPatcher

CARD = torch.device("cuda:0")
MEMORY = 1 << 40


class FakeCard(Backend):
    """The card, as the engine sees it. copying: whether a transfer of the engine's is under way."""

    def __init__(self):
        super().__init__(CARD)
        self.copying = False

    def identity(self):
        return None  # nothing can be checked where nothing is computed

    def copy(self, target, source, stream):
        self.copying = True
        super().copy(target, source, stream)
        self.copying = False

    def memory(self):
        return MEMORY, MEMORY


class Reads(TorchDispatchMode):
    """Notes the keys of parameters that an operation takes out of host memory beside the engine's transfers."""

    def __init__(self, dynamic):
        super().__init__()
        self.dynamic = dynamic
        self.beside = set()
        self.keys = {}
        for bundle in dynamic.bundles:
            for param in bundle.params:
                for part in inner_tensors(param.source):
                    self.keys[part.untyped_storage()._cdata] = param.key

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(value, torch.device) and value.type == "cuda" for value in (*args, *kwargs.values())):
            for value in args:
                if isinstance(value, FakeTensor):
                    value.constant = None  # torch would move a single number to a card that must be there
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.device.type == "cuda":
            for source in args:
                if isinstance(source, FakeTensor) and source.device.type == "cpu" and source.dim():
                    key = self.keys.get(source.untyped_storage()._cdata)
                    if key is not None and not self.dynamic.backend.copying:
                        self.beside.add(key)
        return result


def memory(device=None, torch_free_too=False):
    return (MEMORY, MEMORY) if torch_free_too else MEMORY


@contextmanager
def on_the_card(monkeypatch):
    """Let ComfyUI and the engine take `CARD` for a card that is there, and torch compute by shapes alone."""
    monkeypatch.setattr(attach, "PLAIN", (torch.Tensor, FakeTensor))
    monkeypatch.setattr(model_state, "backend_for", lambda device, memory=None: FakeCard())
    for name in ("get_free_memory", "get_total_memory"):
        monkeypatch.setattr(comfy.model_management, name, memory)
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: CARD)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode, torch.inference_mode():
        yield mode


def store(model, dtype):
    """Give a model that was built without memory weights in host memory, in the `dtype` of its file."""
    for module in model.modules():
        for attr, value in list(vars(module).items()):
            if type(value) is torch.Tensor:
                setattr(module, attr, torch.empty(value.shape, dtype=value.dtype, device="cpu"))
        for attr, parameter in module._parameters.items():
            if parameter is not None:
                stored = dtype if parameter.is_floating_point() else parameter.dtype
                tensor = torch.empty(parameter.shape, dtype=stored, device="cpu")
                module._parameters[attr] = torch.nn.Parameter(tensor, requires_grad=False)
        for attr, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[attr] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def dynamic_on_the_card(model):
    """Make the model dynamic, as loading it does."""
    patcher = DynamicModelPatcher(model, CARD, torch.device("cpu"))
    patcher.partially_load(CARD)
    return patcher
