"""What may be run again after an out-of-memory error, and what happens to what may not."""

import pytest
import torch
from torch import nn

from kit.nets import AnyLinear, same
from kit.sim_device import SimDevice
from spillway.ops.lending.layer import dynamic_class
from spillway.ops.lending.repeat import may_repeat
from spillway.patcher.dynamic_model import DynamicModel

WIDTH = 64


class Cached(nn.Conv1d):
    """A causal convolution that takes what came before out of its cache."""

    def forward(self, x, cache):
        before = cache.pop()
        return super().forward(torch.cat([before, x], -1))


class Writing(nn.Module):
    """A block with a parameter of its own that writes into its input."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x):
        x += self.gate
        return x + self.layer(x).sigmoid()


class WritingLeaf(nn.Module):
    """The same without any module inside."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x):
        x += self.gate
        return x.sigmoid()


class Counting(nn.Linear):
    """Keeps something of its own beside a torch layer's forward."""

    def forward(self, x):
        self.count()
        return super().forward(x)

    def count(self):
        self.calls = getattr(self, "calls", 0) + 1


class Padding(nn.Conv1d):
    """Leaves the forward alone and overrides what that calls."""

    def _conv_forward(self, x, weight, bias):
        x.neg_()
        return super()._conv_forward(x, weight, bias)


# (class, arguments of its constructor)
PURE = [
    *((nn.Linear, (4, 4)), (nn.Embedding, (4, 4)), (nn.LayerNorm, (4,)), (nn.GroupNorm, (2, 4)), (nn.RMSNorm, (4,))),
    *((nn.Conv1d, (4, 4, 3)), (nn.Conv2d, (4, 4, 3)), (nn.Conv3d, (4, 4, 3)), (nn.ConvTranspose2d, (4, 4, 3))),
]
STATEFUL = [
    *((Cached, (4, 4, 3)), (Writing, ()), (WritingLeaf, ()), (Counting, (4, 4)), (Padding, (4, 4, 3))),
    *((AnyLinear, (4,)), (nn.MultiheadAttention, (4, 2)), (nn.Sequential, (nn.Linear(4, 4),)), (nn.LSTM, (4, 4))),
]


@pytest.mark.parametrize("borrows", [False, True], ids=["plain", "dynamic"])
@pytest.mark.parametrize(("cls", "arguments", "pure"), [*((*c, True) for c in PURE), *((*c, False) for c in STATEFUL)])
def test_what_may_be_run_again(cls, arguments, pure, borrows):
    module = cls(*arguments)
    if borrows:
        module.__class__ = dynamic_class(cls)
    assert may_repeat(module) is pure


def test_a_subclass_of_a_borrowing_class_is_judged_by_itself():
    class Derived(dynamic_class(nn.Linear)):
        def extra_repr(self):
            return "anything"

    assert not may_repeat(Derived(4, 4))


def test_a_batch_norm_that_counts_its_calls_is_not_run_again():
    norm = nn.BatchNorm2d(4)
    assert not may_repeat(norm)
    assert may_repeat(norm.eval())


def test_a_method_that_somebody_else_has_put_in_is_not_run_again():
    conv = nn.Conv2d(4, 4, 3)
    conv.forward = conv.forward  # calls the class's own, and only that is repeated
    assert may_repeat(conv)
    conv._conv_forward = conv._conv_forward
    assert not may_repeat(conv)


class Net(nn.Module):
    """Runs its middle on what the first layer has made."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(WIDTH, WIDTH), middle(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize("device", [None, SimDevice], ids=["cpu", "deferred"])
@pytest.mark.parametrize("middle", [Writing, WritingLeaf])
@pytest.mark.parametrize("blocks", [(), ("middle",)], ids=["layers", "a block"])
def test_what_has_written_into_its_input_raises_and_leaves_room(monkeypatch, device, middle, blocks):
    """Run again it would add its parameter twice."""
    net = Net(middle).requires_grad_(False)
    for parameter in net.parameters():
        parameter.data.normal_()
    x = torch.ones(1, WIDTH)
    wanted = net(x)
    model = DynamicModel(net, None, "cpu", blocks=blocks, backend=device and device())
    assert same(model(x), wanted)
    errors = [torch.OutOfMemoryError("simulated")]
    sigmoid = torch.Tensor.sigmoid

    def short(tensor):
        if errors:
            raise errors.pop()
        return sigmoid(tensor)

    monkeypatch.setattr(torch.Tensor, "sigmoid", short)
    with pytest.raises(torch.OutOfMemoryError):
        model(x)
    assert not errors and model.resident_bytes == 0 and model.ledger.counters.retries == 0
    assert any("out of memory in 'middle'" in text and "half way" in text for text in model.ledger.decisions)
    assert same(model(x), wanted)
