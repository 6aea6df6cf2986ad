"""VAEs."""

import torch

from .writing import entries_of, write


def sd_vae_entries(dtype, channels, decoder_channels, quant_conv):
    from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine

    config = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    decoder = {**config, "ch": decoder_channels}
    with torch.device("meta"):  # these classes take no device
        if quant_conv:
            module = AutoencoderKL(ddconfig=config, embed_dim=channels, decoder_ddconfig=decoder)
        else:
            part = "comfy.ldm.modules.diffusionmodules.model."
            module = AutoencodingEngine(
                regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
                encoder_config={"target": part + "Encoder", "params": config},
                decoder_config={"target": part + "Decoder", "params": decoder},
            )
    return entries_of(module, dtype)


def sd_vae(path, dtype=torch.float16, decoder_channels=32, seed=0, drop=(), metadata=None):
    """SD's VAE (4 latent channels).  The encoder always has its real size; 128 decoder channels are the real thing."""
    return write(path, sd_vae_entries(dtype, 4, decoder_channels, True), seed, metadata, drop)


def flux_vae(path, dtype=torch.bfloat16, decoder_channels=32, seed=0, drop=(), metadata=None):
    """Flux's ae: 16 latent channels, no quant_conv."""
    return write(path, sd_vae_entries(dtype, 16, decoder_channels, False), seed, metadata, drop)


def wan_vae(path, dtype=torch.bfloat16, dim=16, seed=0, drop=(), metadata=None):
    """Wan 2.1's video VAE (16 latent channels, 8x8 pixels and 4 frames to a latent); ``dim`` is 96 in the published
    one.  5 MB by default."""
    from comfy.ldm.wan.vae import WanVAE

    with torch.device("meta"):
        module = WanVAE(
            dim=dim,
            z_dim=16,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            attn_scales=[],
            temperal_downsample=[False, True, True],
            image_channels=3,
            conv_out_channels=3,
            dropout=0.0,
        )
    return write(path, entries_of(module, dtype), seed, metadata, drop)
