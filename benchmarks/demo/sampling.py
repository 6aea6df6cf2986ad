"""Euler sampling of a rectified flow over packed Flux latents, with inputs that depend on nothing but a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .flux import FluxConfig

TOKEN_PIXELS = 16  # along one side: 8 pixels to a latent position, 2 of those to a token
DEFAULT_SIZE = 384  # pixels: a step of the default model then takes a second or two on two CPU cores
TEXT_TOKENS = 128


@dataclass(frozen=True)
class Conditioning:
    """What the model is given besides the latents: text tokens (B, T, C), pooled text (B, V), guidance (B,)."""

    txt: Tensor
    txt_ids: Tensor
    pooled: Tensor
    guidance: Tensor | None


def image_ids(height: int, width: int) -> Tensor:
    """Return the positions (1, I, 3) of ``height`` x ``width`` tokens: the image's index (0), the row, the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(1, -1, 3).float()


def make_inputs(
    config: FluxConfig, size: int = DEFAULT_SIZE, seed: int = 0, text_tokens: int = TEXT_TOKENS
) -> tuple[Tensor, Tensor, Conditioning]:
    """Make noise (1, I, 64), its ids (1, I, 3) and a prompt, in fp32 on the CPU, so that every device gets the same."""
    if size <= 0 or size % TOKEN_PIXELS:
        raise ValueError(f"the size is {size} pixels; expected a positive multiple of {TOKEN_PIXELS}")
    generator = torch.Generator().manual_seed(seed)
    tokens = size // TOKEN_PIXELS
    noise = torch.randn(1, tokens * tokens, config.in_channels, generator=generator)
    conditioning = Conditioning(
        txt=torch.randn(1, text_tokens, config.context_dim, generator=generator),
        txt_ids=torch.zeros(1, text_tokens, 3),
        pooled=torch.randn(1, config.vector_dim, generator=generator),
        guidance=torch.full((1,), 3.5) if config.guidance else None,
    )
    return noise, image_ids(tokens, tokens), conditioning


def sample(
    model: Callable[..., Tensor],
    noise: Tensor,
    ids: Tensor,
    conditioning: Conditioning,
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 4,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Follow the model's velocity from ``noise`` at time 1 to an image at time 0; return latents (1, I, 64) in fp32.

    The latents are kept in fp32 and given to the model in ``dtype``. ``callback(done, latents)`` runs after each step.
    """
    latents, ids = noise.to(device), ids.to(device)
    txt, pooled = (t.to(device, dtype) for t in (conditioning.txt, conditioning.pooled))
    txt_ids = conditioning.txt_ids.to(device)
    guidance = None if conditioning.guidance is None else conditioning.guidance.to(device)
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    with torch.inference_mode():
        for step, (now, following) in enumerate(pairwise(times)):
            time = torch.full((latents.shape[0],), now, device=device)
            velocity = model(latents.to(dtype), ids, txt, txt_ids, time, pooled, guidance)
            latents = latents + (following - now) * velocity.float()
            if callback is not None:
                callback(step + 1, latents)
    return latents.cpu()
