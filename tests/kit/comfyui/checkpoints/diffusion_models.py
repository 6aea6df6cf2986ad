"""Diffusion models alone."""

from pathlib import Path

import torch

from .writing import OPS, entries_of, write


def flux(
    path,
    dtype=torch.bfloat16,
    hidden=256,
    depth=2,
    depth_single=2,
    context=128,
    pooled=64,
    guidance=True,
    prefix="",
    seed=0,
    drop=(),
    metadata=None,
):
    """A Flux.1 with the key names of Black Forest Labs' files.  ``hidden``: a multiple of 128.  About 36
    hidden**2 weights a double block and 15 a single one: (3072, 2, 2) gives 2 GB in bf16, the default 14 MB."""
    entries = flux_entries(dtype, hidden, depth, depth_single, context, pooled, guidance, prefix)
    return write(path, entries, seed, metadata, drop)


def flux_entries(dtype, hidden, depth, depth_single, context=128, pooled=64, guidance=True, prefix=""):
    """What `flux` writes: {name: (shape, dtype, mean, std)}."""
    from comfy.ldm.flux.model import Flux

    module = Flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=pooled,
        context_in_dim=context,
        hidden_size=hidden,
        mlp_ratio=4.0,
        num_heads=hidden // 128,
        depth=depth,
        depth_single_blocks=depth_single,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=guidance,
        txt_ids_dims=[],
        device="meta",
        dtype=torch.float32,
        operations=OPS,
    )
    return entries_of(module, dtype, prefix, lambda name: name.replace("_norm.weight", "_norm.scale"))


def flux_as_diffusers(path, dtype=torch.bfloat16, hidden=256, depth=2, depth_single=2, **others):
    """The same model with the names, the split weights and the order of scale and shift of diffusers' files."""
    import safetensors.torch
    from comfy.utils import flux_to_diffusers

    plain = Path(flux(path, dtype, hidden, depth, depth_single, **others))
    tensors = safetensors.torch.load(plain.read_bytes())  # not a map: the file is written anew
    shape = {"depth": depth, "depth_single_blocks": depth_single, "hidden_size": hidden}
    entries, used = {}, set()
    for name, target in flux_to_diffusers(shape).items():
        target, place, convert, *_ = *((target,) if isinstance(target, str) else target), None, None
        target = target.replace("_norm.weight", "_norm.scale")
        if target not in tensors or (place is None and target in used):  # of other models, or by another name
            continue
        used.add(target)
        part = tensors[target] if place is None else tensors[target].narrow(*place)
        entries[name] = part if convert is None else convert(part)
    assert used == set(tensors)
    return write(path, entries)


def wan(path, dtype=torch.bfloat16, dim=256, ffn=512, layers=3, prefix="", seed=0, drop=(), metadata=None):
    """A Wan 2.1 text-to-video.  ``dim``: a multiple of 128.  Its text width is 4096 whatever the size."""
    from comfy.ldm.wan.model import WanModel

    module = WanModel(
        model_type="t2v",
        dim=dim,
        ffn_dim=ffn,
        num_heads=dim // 128,
        num_layers=layers,
        in_dim=16,
        out_dim=16,
        device="meta",
        dtype=torch.float32,
        operations=OPS,
    )
    return write(path, entries_of(module, dtype, prefix), seed, metadata, drop)


def lumina2(path, dtype=torch.bfloat16, dim=288, layers=2, context=128, prefix="", seed=0, drop=(), metadata=None):
    """A Lumina Image 2.0.  ``dim``: a multiple of 96, three heads to a key/value head.  ComfyUI knows 2304 only (0.8
    GB with one layer, as four refiner layers come with it); see accept_small_lumina for the others."""
    from comfy.ldm.lumina.model import NextDiT

    heads = dim // 96
    module = NextDiT(
        patch_size=2,
        in_channels=16,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=max(heads // 3, 1),
        qk_norm=True,
        cap_feat_dim=context,
        axes_dims=[32, 32, 32],
        axes_lens=[300, 512, 512],
        ffn_dim_multiplier=4.0,
        device="meta",
        dtype=torch.float32,
        operations=OPS,
    )
    return write(path, entries_of(module, dtype, prefix), seed, metadata, drop)


def qwen_image(path, dtype=torch.bfloat16, dim=256, layers=2, seed=0):
    """A Qwen-Image.  ``dim``: a multiple of 128, see accept_small_lumina for others than 3072."""
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    sizes = {"num_layers": layers, "num_attention_heads": dim // 128}
    module = QwenImageTransformer2DModel(**sizes, device="meta", dtype=torch.float32, operations=OPS)
    return write(path, entries_of(module, dtype), seed)


def z_image(path, dtype=torch.bfloat16, dim=256, layers=3, context=128, prefix="", seed=0, drop=(), metadata=None):
    """A Z-Image.  ``dim``: a multiple of 128.  ComfyUI knows 3840 only (1.5 GB with no layer but the four refiner
    layers, 0.36 GB more a layer); see accept_small_lumina for the others."""
    from comfy.ldm.lumina.model import NextDiT

    heads = dim // 128
    module = NextDiT(
        patch_size=2,
        in_channels=16,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        qk_norm=True,
        cap_feat_dim=context,
        axes_dims=[32, 48, 48],
        axes_lens=[1536, 512, 512],
        rope_theta=256.0,
        ffn_dim_multiplier=8.0 / 3.0,
        z_image_modulation=True,
        time_scale=1000.0,
        pad_tokens_multiple=32,
        device="meta",
        dtype=torch.float32,
        operations=OPS,
    )
    return write(path, entries_of(module, dtype, prefix), seed, metadata, drop)


def sd15_config(mult, blocks):
    """The options of ComfyUI's U-Net class for SD 1.5."""
    # attention on every level but the deepest, as in the real one
    attention = [1] * (len(mult) - 1) + [0] if len(mult) > 1 else [1]
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [blocks] * len(mult),
        "channel_mult": list(mult),
        "transformer_depth": [depth for depth in attention for _ in range(blocks)],
        "transformer_depth_output": [depth for depth in attention for _ in range(blocks + 1)],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "num_heads": 8,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_linear_in_transformer": False,
        "device": "meta",
        "dtype": torch.float32,
        "operations": OPS,
    }


def sd15_unet_entries(dtype, mult, blocks, **others):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return entries_of(UNetModel(**{**sd15_config(mult, blocks), **others}), dtype)


def sd15_unet(path, dtype=torch.float16, mult=(1, 2), blocks=1, seed=0, drop=(), metadata=None):
    """The UNet alone."""
    return write(path, sd15_unet_entries(dtype, mult, blocks), seed, metadata, drop)
