"""INT8 weights of normal numbers, and how far a product is from the exact one."""

import torch

from spillway.ops.gather import gathered_bytes, interpret_gathered_like
from spillway.ops.int8.weight import Int8Weight


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
