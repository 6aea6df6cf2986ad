"""Tensors of the fake device: real torch tensors, computed with the CPU's bits, never mixed with CPU tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True, params=["grad", "no_grad", "inference"])
def mode(fake, request):
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[request.param]
    with context():
        yield


def same(ours, theirs):
    assert ours.device == DEVICE
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours.cpu(), theirs)


def test_a_tensor_is_one_of_torch():
    tensor = torch.arange(6.0).view(2, 3).to(DEVICE)
    assert type(tensor) is torch.Tensor and tensor.is_cuda and tensor.device == DEVICE
    assert torch.ones(2, device="cuda").device == DEVICE
    assert tensor.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert bool((tensor >= 0).all()) and tensor.sum().item() == 15
    assert "cuda:0" in repr(tensor)


LAYERS = {
    "linear": (lambda: torch.nn.Linear(8, 3), (2, 4, 8)),
    "conv1d": (lambda: torch.nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "conv2d": (lambda: torch.nn.Conv2d(4, 4, 3, groups=2, padding=1), (2, 4, 8, 8)),
    "conv3d": (lambda: torch.nn.Conv3d(4, 2, 3, padding=1), (1, 4, 3, 8, 8)),
    "transposed": (lambda: torch.nn.ConvTranspose2d(4, 2, 3), (2, 4, 8, 8)),
    "group_norm": (lambda: torch.nn.GroupNorm(2, 4), (2, 4, 8, 8)),
    "layer_norm": (lambda: torch.nn.LayerNorm(8), (2, 4, 8)),
    "rms_norm": (lambda: torch.nn.RMSNorm(8), (2, 4, 8)),
    "batch_norm": (lambda: torch.nn.BatchNorm2d(4).eval(), (2, 4, 8, 8)),
    "gru": (lambda: torch.nn.GRU(8, 4, batch_first=True), (2, 5, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_the_bits_of_the_cpu(name, dtype):
    make, shape = LAYERS[name]
    layer = make().requires_grad_(False).to(dtype)
    data = torch.randn(shape).to(dtype)
    want = layer(data)
    layer.to(DEVICE)
    assert all(parameter.device == DEVICE for parameter in layer.parameters())
    got = layer(data.to(DEVICE))
    same(got[0] if name == "gru" else got, want[0] if name == "gru" else want)


FUNCTIONS = {
    "attention": lambda t: F.scaled_dot_product_attention(t, t, t),
    "attention_mask": lambda t: F.scaled_dot_product_attention(t, t, t, attn_mask=torch.ones_like(t[0, 0] @ t[0, 0].T)),
    "softmax": lambda t: t.softmax(-1),
    "matmul": lambda t: t @ t.transpose(-1, -2),
    "einsum": lambda t: torch.einsum("bhqd,bhkd->bhqk", t, t),
    "interpolate": lambda t: F.interpolate(t, scale_factor=2, mode="bicubic"),
    "pad": lambda t: F.pad(t, (1, 2, 0, 1), mode="reflect"),
    "cat": lambda t: torch.cat([t, t], 1),
    "index": lambda t: t[:, torch.tensor([0, 1], device=t.device)],
    "index_by_cpu": lambda t: t[:, torch.tensor([1, 0])],
    "mask": lambda t: t[t > 0],
    "sort": lambda t: t.sort(-1)[0],
    "fp8": lambda t: t.to(torch.float8_e4m3fn).to(torch.float32),
    "gelu": lambda t: F.gelu(t, approximate="tanh"),
    "fft": lambda t: torch.fft.ifft(torch.fft.fft(t).conj()).real,
    "where": lambda t: torch.where(t > 0, t, torch.tensor(0.5)),
    "number": lambda t: t * torch.tensor(2.0) + 1,
    "unfold": lambda t: F.unfold(t, 2),
    "cumsum": lambda t: t.cumsum(-1),
    "grid": lambda t: F.grid_sample(t, t[..., :2].clamp(-1, 1), align_corners=False),
    "foreach": lambda t: torch._foreach_mul([t, t], 2.0)[1],
    "linspace": lambda t: torch.linspace(0, 1, 7, device=t.device),
    "arange": lambda t: torch.arange(5, device=t.device),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_give_the_bits_of_the_cpu(name):
    data = torch.randn(2, 2, 8, 8)
    same(FUNCTIONS[name](data.to(DEVICE)), FUNCTIONS[name](data))


MIXES = {
    "add": lambda a, c: a + c,
    "add_reversed": lambda a, c: c + a,
    "into_cpu": lambda a, c: c.add_(a),
    "into_device": lambda a, c: a.add_(c),
    "out": lambda a, c: torch.matmul(a, a, out=c),
    "cat": lambda a, c: torch.cat([a, c]),
    "linear": lambda a, c: F.linear(a, c),
    "bias": lambda a, c: F.linear(a, a, c[0]),
    "conv_weight": lambda a, c: F.conv1d(a[None], c[:, :, None]),
    "norm_weight": lambda a, c: F.layer_norm(a, (4,), c[0]),
    "embedding": lambda a, c: F.embedding(torch.tensor([1]), a),
    "where": lambda a, c: torch.where(a > 0, a, c),
    "attention": lambda a, c: F.scaled_dot_product_attention(a[None], a[None], c[None]),
    "index_select": lambda a, c: torch.index_select(a, 0, torch.tensor([0])),
    "gather": lambda a, c: a.gather(0, torch.zeros(1, 4, dtype=torch.int64)),
    "number_matmul": lambda a, c: torch.dot(a[0], c[0]),
    "write_number": lambda a, c: c.sum().add_(a.sum()),
    "indexed_by_device": lambda a, c: c[a > 0],
    "set_data": lambda a, c: a.set_(c.untyped_storage()),
}


@pytest.mark.parametrize("name", MIXES)
def test_mixing_with_the_cpu_raises(name):
    with pytest.raises(RuntimeError, match="device"):
        MIXES[name](torch.ones(4, 4, device=DEVICE), torch.ones(4, 4))


def test_mixing_two_devices_raises():
    with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
        torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")
    moved = torch.arange(3.0, device="cuda:0").to("cuda:1")
    assert moved.device.index == 1 and moved.tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.ones(2, device="cuda:2")


def test_views_share_memory():
    memory = torch.zeros(1024, dtype=torch.uint8, device=DEVICE)
    view = memory[512:560].view(torch.float32).view(3, 4)
    assert view.data_ptr() == memory.data_ptr() + 512 and view.storage_offset() == 128
    data = torch.arange(12.0).view(3, 4)
    view.copy_(data)
    same(memory[512:560].view(torch.float32).view(3, 4), data)
    view.t()[0, 1] = 99
    view[2] = 5
    view.chunk(2, dim=1)[1].zero_()
    same(view, torch.tensor([[0.0, 1, 0, 0], [99, 5, 0, 0], [5, 5, 0, 0]]))
    same(torch.as_strided(memory.view(torch.float32), (2, 2), (4, 1), 128), view.cpu()[:2, :2])
    parameter = torch.nn.Parameter(view, requires_grad=False)
    assert parameter.device == DEVICE and parameter.data_ptr() == view.data_ptr()
    assert copy.deepcopy(parameter).data_ptr() != view.data_ptr()


def test_resizing_and_out():
    out = torch.empty(0, device=DEVICE)
    torch.add(torch.ones(3, 4, device=DEVICE), 1, out=out)
    same(out, torch.full((3, 4), 2.0))
    grown = torch.ones(2, device=DEVICE)
    grown.resize_(100).fill_(1)
    same(grown, torch.ones(100))
    grown.set_()
    assert grown.numel() == 0 and grown.device == DEVICE


def test_random_numbers_come_from_generators_of_the_device():
    generator = torch.Generator(DEVICE).manual_seed(3)
    assert generator.device == DEVICE
    same(torch.randn(5, device=DEVICE, generator=generator), torch.randn(5, generator=torch.Generator().manual_seed(3)))
    with pytest.raises(RuntimeError, match="'cuda' device type for generator but found 'cpu'"):
        torch.randn(5, device=DEVICE, generator=torch.Generator())


def test_the_device_draws_on_its_own():
    torch.manual_seed(7)
    cpu, device = torch.rand(5), torch.rand(5, device=DEVICE).cpu()
    torch.manual_seed(7)
    same(torch.rand(5, device=DEVICE), device)
    assert torch.equal(torch.rand(5), cpu)


def test_gradients_flow():
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.ones(3, device=DEVICE, requires_grad=True)
        (weight * torch.arange(3.0, device=DEVICE)).sum().backward()
        same(weight.grad, torch.arange(3.0))
