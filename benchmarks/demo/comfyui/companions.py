"""The two small files that a text-to-image graph needs beside the diffusion model: a CLIP-L text encoder and a VAE.

Both are random, of the real architectures, and accepted by the loaders of a stock ComfyUI. CLIP-L alone is enough for a
Flux graph: loaded with the type "sd3" it is padded to the 4096 channels of the other encoder, which would be 5 to 9 GB.
"""

from __future__ import annotations

from pathlib import Path

from .. import random_weights
from ..random_weights import Fill

TEXT_ENCODER = "demo-clip-l.safetensors"
VAE = "demo-vae.safetensors"

CLIP_WIDTH, CLIP_LAYERS, CLIP_VOCABULARY, CLIP_POSITIONS = 768, 12, 49408, 77
VAE_WIDTH, LATENT_CHANNELS = 64, 16
# What Flux latents are divided by and centred on before its autoencoder's tiny version decodes them.
LATENT_STD, LATENT_MEAN = 0.3611, 0.1159


def _linear(fills: dict[str, Fill], name: str, out: int, into: int, bias: bool = True) -> None:
    fills[f"{name}.weight"] = Fill((out, into), into**-0.5)
    if bias:
        fills[f"{name}.bias"] = Fill((out,), 0.02)


def _norm(fills: dict[str, Fill], name: str) -> None:
    fills[f"{name}.weight"] = Fill((CLIP_WIDTH,), 0.02, mean=1.0)
    fills[f"{name}.bias"] = Fill((CLIP_WIDTH,), 0.02)


def clip_fills() -> dict[str, Fill]:
    """List the tensors of a CLIP ViT-L/14 text tower, 123 M parameters."""
    fills: dict[str, Fill] = {}
    embeddings = "text_model.embeddings"
    fills[f"{embeddings}.token_embedding.weight"] = Fill((CLIP_VOCABULARY, CLIP_WIDTH), 0.5)
    fills[f"{embeddings}.position_embedding.weight"] = Fill((CLIP_POSITIONS, CLIP_WIDTH), 0.1)
    for index in range(CLIP_LAYERS):
        layer = f"text_model.encoder.layers.{index}"
        _norm(fills, f"{layer}.layer_norm1")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _linear(fills, f"{layer}.self_attn.{name}", CLIP_WIDTH, CLIP_WIDTH)
        _norm(fills, f"{layer}.layer_norm2")
        _linear(fills, f"{layer}.mlp.fc1", 4 * CLIP_WIDTH, CLIP_WIDTH)
        _linear(fills, f"{layer}.mlp.fc2", CLIP_WIDTH, 4 * CLIP_WIDTH)
    _norm(fills, "text_model.final_layer_norm")
    _linear(fills, "text_projection", CLIP_WIDTH, CLIP_WIDTH, bias=False)
    return fills


def _conv(fills: dict[str, Fill], name: str, out: int, into: int, bias: bool = True, gain: float = 1.0) -> None:
    fills[f"{name}.weight"] = Fill((out, into, 3, 3), gain * (9 * into) ** -0.5)
    if bias:
        fills[f"{name}.bias"] = Fill((out,), 0.02)


def _residual(fills: dict[str, Fill], name: str) -> None:
    # A weak branch beside the identity: ten of these in a row must neither fade nor blow up.
    for index, gain in ((0, 1.4), (2, 1.4), (4, 0.3)):
        _conv(fills, f"{name}.conv.{index}", VAE_WIDTH, VAE_WIDTH, gain=gain)


def vae_fills() -> dict[str, Fill]:
    """List the tensors of the tiny autoencoder for Flux latents: three halvings, three residual blocks after each."""
    fills: dict[str, Fill] = {}
    encoder, decoder = "taesd_encoder", "taesd_decoder"
    _conv(fills, f"{encoder}.0", VAE_WIDTH, 3)
    _residual(fills, f"{encoder}.1")
    for start in (2, 6, 10):
        _conv(fills, f"{encoder}.{start}", VAE_WIDTH, VAE_WIDTH, bias=False)
        for index in range(start + 1, start + 4):
            _residual(fills, f"{encoder}.{index}")
    _conv(fills, f"{encoder}.14", LATENT_CHANNELS, VAE_WIDTH)

    _conv(fills, f"{decoder}.1", VAE_WIDTH, LATENT_CHANNELS, gain=1.4)
    for start in (3, 8, 13):
        for index in range(start, start + 3):
            _residual(fills, f"{decoder}.{index}")
        _conv(fills, f"{decoder}.{start + 4}", VAE_WIDTH, VAE_WIDTH, bias=False, gain=1.4)
    _residual(fills, f"{decoder}.18")
    _conv(fills, f"{decoder}.19", 3, VAE_WIDTH, gain=0.12)
    # Little contrast around mid-grey: values outside 0..1 would be cut off.
    fills[f"{decoder}.19.bias"] = Fill((3,), 0.0, mean=0.5)
    fills["vae_scale"] = Fill((), 0.0, mean=LATENT_STD)
    fills["vae_shift"] = Fill((), 0.0, mean=LATENT_MEAN)
    return fills


def ensure_companions(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Return the paths of the text encoder (250 MB) and the VAE (5 MB) in ``folder``, writing what is not there."""
    text_encoder = random_weights.ensure(folder / TEXT_ENCODER, clip_fills(), {}, seed)
    return text_encoder, random_weights.ensure(folder / VAE, vae_fills(), {}, seed)
