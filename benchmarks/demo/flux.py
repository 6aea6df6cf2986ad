"""The Flux.1 diffusion transformer in plain torch, with the parameter names and shapes of a Flux.1 checkpoint.

Text and image tokens first run through double-stream blocks (own weights, joint attention), then, concatenated, through
single-stream blocks (attention and MLP in parallel). The shift, scale and gate of every block come from one vector that
holds time, guidance and pooled text.

Shapes below: B batch, I image tokens, T text tokens, L = T + I, H hidden size, N heads, D = H / N.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import GELU, Linear, Module, ModuleList, Parameter, Sequential, SiLU

TIME_DIM = 256
NORM_EPS = 1e-6


@dataclass(frozen=True)
class FluxConfig:
    """The sizes of a Flux model. The defaults are the published ones but for width and depth, which are shrunk."""

    hidden_size: int = 1024
    depth: int = 8
    depth_single: int = 16
    in_channels: int = 64
    context_dim: int = 4096
    vector_dim: int = 768
    mlp_ratio: int = 4
    guidance: bool = True
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10000

    def __post_init__(self) -> None:
        if self.hidden_size % self.head_dim:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of the head size {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Width of one head. The positional axes share it out, so their sum fixes it."""
        return sum(self.axes_dim)

    @property
    def heads(self) -> int:
        return self.hidden_size // self.head_dim


def config_from_keys(specs: Mapping[str, Any]) -> FluxConfig:
    """Read the sizes from a checkpoint header: ``specs`` maps a key to anything that has a ``shape``."""

    def shape(key: str) -> tuple[int, ...]:
        if key not in specs:
            raise ValueError(f"not a Flux.1 checkpoint: it has no '{key}'")
        return tuple(specs[key].shape)

    def count(prefix: str) -> int:
        return len({m[1] for key in specs if (m := re.match(rf"{prefix}\.(\d+)\.", key))})

    hidden, in_channels = shape("img_in.weight")
    return FluxConfig(
        hidden_size=hidden,
        in_channels=in_channels,
        depth=count("double_blocks"),
        depth_single=count("single_blocks"),
        context_dim=shape("txt_in.weight")[1],
        vector_dim=shape("vector_in.in_layer.weight")[1],
        mlp_ratio=shape("double_blocks.0.img_mlp.0.weight")[0] // hidden,
        guidance="guidance_in.in_layer.weight" in specs,
    )


def sinusoids(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn times or guidance strengths (B,) into (B, 256) waves. Angles stay in fp32: bf16 has no digits for them."""
    half = TIME_DIM // 2
    rates = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = 1000.0 * t.float()[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def rotation(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (B, 1, L, D/2, fp32) of the rotary position embedding of the ids (B, L, axes)."""
    # MPS has no fp64; the angles are tiny next to the model, so there they are computed on the CPU.
    home = torch.device("cpu") if ids.device.type == "mps" else ids.device
    positions, angles = ids.to(home, torch.float64), []
    for axis, dim in enumerate(axes_dim):
        rates = theta ** -(torch.arange(0, dim, 2, device=home, dtype=torch.float64) / dim)
        angles.append(positions[..., axis, None] * rates)
    angle = torch.cat(angles, dim=-1).unsqueeze(1)
    return angle.cos().float().to(ids.device), angle.sin().float().to(ids.device)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each neighbouring pair of the last axis of ``x`` (B, N, L, D) by its position's angle."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def attend(qkv: tuple[Tensor, Tensor, Tensor], rope: tuple[Tensor, Tensor]) -> Tensor:
    """Attend over heads (B, N, L, D) with rotated queries and keys; return tokens (B, L, H)."""
    q, k, v = qkv
    out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
    return out.transpose(1, 2).flatten(2)


class Shift(NamedTuple):
    """One modulation: where a branch reads its input (shift, scale) and how much of it is added back (gate)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(Module):
    """Projects the conditioning vector (B, H) to ``count`` modulations, each of three (B, 1, H) tensors."""

    def __init__(self, hidden: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = Linear(hidden, 3 * count * hidden)

    def forward(self, vec: Tensor) -> list[Shift]:
        parts = self.lin(F.silu(vec))[:, None, :].chunk(3 * self.count, dim=-1)
        return [Shift(*parts[3 * i : 3 * i + 3]) for i in range(self.count)]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise tokens (B, L, H) without learned weights, then shift and scale them."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


class RMSNorm(Module):
    """RMS norm over the last axis; its weight is called ``scale`` in Flux.1 files."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, NORM_EPS)


class QKNorm(Module):
    """Splits a fused projection (B, L, 3H) into heads (B, N, L, D) and normalises queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, fused: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = fused.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.query_norm(q), self.key_norm(k), v


class StreamAttention(Module):
    """One stream's half of the joint attention: projections in and out."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(self.qkv(x), self.heads)


def mlp(config: FluxConfig) -> Sequential:
    wide = config.hidden_size * config.mlp_ratio
    return Sequential(Linear(config.hidden_size, wide), GELU(approximate="tanh"), Linear(wide, config.hidden_size))


class DoubleBlock(Module):
    """Text and image with their own weights, meeting in one attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.img_mod = Modulation(config.hidden_size, 2)
        self.img_attn = StreamAttention(config)
        self.img_mlp = mlp(config)
        self.txt_mod = Modulation(config.hidden_size, 2)
        self.txt_attn = StreamAttention(config)
        self.txt_mlp = mlp(config)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        img_in, img_out = self.img_mod(vec)
        txt_in, txt_out = self.txt_mod(vec)
        img_heads = self.img_attn.project(modulated(img, img_in.shift, img_in.scale))
        txt_heads = self.txt_attn.project(modulated(txt, txt_in.shift, txt_in.scale))
        # Text comes first in the joint sequence, as in the ids.
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(txt_heads, img_heads, strict=True))
        txt_seen, img_seen = attend((q, k, v), rope).split((txt.shape[1], img.shape[1]), dim=1)
        img = img + img_in.gate * self.img_attn.proj(img_seen)
        img = img + img_out.gate * self.img_mlp(modulated(img, img_out.shift, img_out.scale))
        txt = txt + txt_in.gate * self.txt_attn.proj(txt_seen)
        txt = txt + txt_out.gate * self.txt_mlp(modulated(txt, txt_out.shift, txt_out.scale))
        return img, txt


class SingleBlock(Module):
    """Attention and MLP side by side over the joint sequence: one projection in, one out."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.heads = config.heads
        wide = config.hidden_size * config.mlp_ratio
        self.modulation = Modulation(config.hidden_size, 1)
        self.linear1 = Linear(config.hidden_size, 3 * config.hidden_size + wide)
        self.norm = QKNorm(config.head_dim)
        self.linear2 = Linear(config.hidden_size + wide, config.hidden_size)

    def forward(self, x: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        (mod,) = self.modulation(vec)
        hidden = x.shape[-1]
        fused = self.linear1(modulated(x, mod.shift, mod.scale))
        seen = attend(self.norm(fused[..., : 3 * hidden], self.heads), rope)
        thought = F.gelu(fused[..., 3 * hidden :], approximate="tanh")
        return x + mod.gate * self.linear2(torch.cat((seen, thought), dim=-1))


class Embedder(Module):
    """A two-layer projection of a conditioning vector (B, dim) to (B, H)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = Linear(dim, hidden)
        self.out_layer = Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class FinalLayer(Module):
    """The last modulation and the projection back to latent channels."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.adaLN_modulation = Sequential(SiLU(), Linear(config.hidden_size, 2 * config.hidden_size))
        self.linear = Linear(config.hidden_size, config.in_channels)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


class Flux(Module):
    """Predicts the flow's velocity for packed latents. It computes in the dtype of ``img``."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.img_in = Linear(config.in_channels, hidden)
        self.txt_in = Linear(config.context_dim, hidden)
        self.time_in = Embedder(TIME_DIM, hidden)
        self.vector_in = Embedder(config.vector_dim, hidden)
        if config.guidance:
            self.guidance_in = Embedder(TIME_DIM, hidden)
        self.double_blocks = ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = ModuleList(SingleBlock(config) for _ in range(config.depth_single))
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        time: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (B, I, 64) for packed latents.

        ``img`` (B, I, 64), ``img_ids`` (B, I, 3), ``txt`` (B, T, context), ``txt_ids`` (B, T, 3), ``time`` (B,) from 1
        (noise) to 0 (image), ``pooled`` (B, vector), ``guidance`` (B,) for the guidance-distilled variant.
        """
        vec = self.time_in(sinusoids(time, img.dtype)) + self.vector_in(pooled)
        if self.config.guidance and guidance is not None:
            vec = vec + self.guidance_in(sinusoids(guidance, img.dtype))
        rope = rotation(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        x = torch.cat((txt, img), dim=1)
        for block in self.single_blocks:
            x = block(x, vec, rope)
        return self.final_layer(x[:, txt.shape[1] :], vec)
