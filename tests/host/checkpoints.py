"""Writes small model files of real architectures, with seeded random weights.

The names and shapes of a file are read off the core's own module, built on the meta device, so the core's own loaders
accept it.  Nothing of the model is ever held in memory: tensors are streamed one by one from a small pool of normal
numbers, at about the speed of the disk, so a 2 GB file is cheap.  The statistics (linear weights ~ N(0, 1/fan_in),
norm weights near 1, small biases) keep the activations finite and let the output depend on every tensor.

Every builder takes ``path``, ``dtype``, ``seed`` and ``drop`` (keys to leave out), and returns ``str(path)``.
"""

import contextlib
import functools
import json
import math
import os
import struct
import tempfile
import zlib

import comfy.ops
import torch

OPS = comfy.ops.disable_weight_init
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# --- writing ----------------------------------------------------------------------------------------------------------


class Noise:
    """Endless seeded N(0, 1): one pool of 2**22 - 3 numbers (a prime, so rows never repeat each other), entered
    elsewhere for each name."""

    SIZE = 2**22 - 3

    def __init__(self, seed=0):
        self.seed = seed
        self.pool = torch.randn(self.SIZE, generator=torch.Generator().manual_seed(seed))

    def chunks(self, name, count, mean, std, dtype):
        start = zlib.crc32(f"{self.seed}/{name}".encode()) % self.SIZE
        if start + count <= self.SIZE:
            yield self.pool[start : start + count].mul(std).add_(mean).to(dtype)
            return
        whole = self.pool.mul(std).add_(mean).to(dtype)
        while count > 0:
            part = whole[start : start + count]
            yield part
            count -= part.numel()
            start = 0


def _data(tensor):
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write(path, entries, seed=0, metadata=None, drop=()):
    """``entries``: {name: (shape, dtype, mean, std)} or {name: tensor}.  Streams a .safetensors file."""
    entries = {name: entry for name, entry in entries.items() if name not in drop}
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, entry in entries.items():
        shape, dtype = (entry.shape, entry.dtype) if torch.is_tensor(entry) else entry[:2]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    noise = Noise(seed)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in entries.items():
            if torch.is_tensor(entry):
                file.write(_data(entry))
            else:
                shape, dtype, mean, std = entry
                for chunk in noise.chunks(name, math.prod(shape), mean, std, dtype):
                    file.write(_data(chunk))
    return str(path)


def read_header(path):
    """{name: {"dtype", "shape", "data_offsets"}} of a .safetensors file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return header


def entries_of(module, dtype, prefix="", rename=None):
    """The entries of everything in a (meta) module's state dict; ``dtype`` may be a function of name and shape."""
    embeddings = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Embedding)}
    out = {}
    for name, tensor in module.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("gamma"):  # a norm, even where it has the shape of an image
            mean, std = 1.0, 0.1
        elif len(shape) >= 2 and name not in embeddings:
            mean, std = 0.0, 1.0 / math.sqrt(math.prod(shape[1:]))
        elif len(shape) >= 2:
            mean, std = 0.0, 0.5
        elif name.endswith(("bias", "_emb", "embed", "embedding", "token")):
            mean, std = 0.0, 0.05
        else:  # a norm
            mean, std = 1.0, 0.1
        kind = dtype(name, shape) if callable(dtype) else dtype
        out[prefix + (rename(name) if rename else name)] = (shape, kind, mean, std)
    return out


def _prefixed(entries, prefix):
    return {prefix + name: entry for name, entry in entries.items()}


# --- diffusion models -------------------------------------------------------------------------------------------------


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
    entries = entries_of(module, dtype, prefix, lambda name: name.replace("_norm.weight", "_norm.scale"))
    return write(path, entries, seed, metadata, drop)


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
    """A Lumina Image 2.0.  ``dim``: a multiple of 96, three heads to a key/value head.  The core knows 2304 only (0.8
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


def z_image(path, dtype=torch.bfloat16, dim=256, layers=3, context=128, prefix="", seed=0, drop=(), metadata=None):
    """A Z-Image.  ``dim``: a multiple of 128.  The core knows 3840 only (1.5 GB with no layer but the four refiner
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


def accept_small_lumina():
    """Let the core's detection recognise Lumina 2 and Z-Image files of other widths than 2304 and 3840.

    The core keeps the number of heads of these two by width and would build every other width wrongly (it fails an
    assertion), so nothing that works without this works differently with it.  A small Z-Image becomes the core's
    `Lumina2` model with a Z-Image's options: its timestep shift is 6 instead of 3, the network is the same.
    """
    import comfy.model_detection as detection

    plain = detection.detect_unet_config
    if getattr(plain, "accepts_small_lumina", False):
        return

    @functools.wraps(plain)
    def detect_unet_config(state_dict, key_prefix, *args, **kwargs):
        config = plain(state_dict, key_prefix, *args, **kwargs)
        if config is None or config.get("image_model") != "lumina2" or config["dim"] in (2304, 3840, 4096):
            return config
        dim = config["dim"]
        if state_dict[f"{key_prefix}t_embedder.mlp.2.weight"].shape[0] == 256:
            config.update(
                n_heads=dim // 128,
                n_kv_heads=dim // 128,
                axes_dims=[32, 48, 48],
                axes_lens=[1536, 512, 512],
                rope_theta=256.0,
                ffn_dim_multiplier=8.0 / 3.0,
                z_image_modulation=True,
                time_scale=1000.0,
            )
            if f"{key_prefix}cap_pad_token" in state_dict:
                config["pad_tokens_multiple"] = 32
        else:
            config.update(
                n_heads=dim // 96,
                n_kv_heads=max(dim // 288, 1),
                axes_dims=[32, 32, 32],
                axes_lens=[300, 512, 512],
                rope_theta=10000.0,
                ffn_dim_multiplier=4.0,
            )
        return config

    detect_unet_config.accepts_small_lumina = True
    detection.detect_unet_config = detect_unet_config


def _sd15_unet(dtype, mult, blocks, **others):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    # attention on every level but the deepest, as in the real one
    attention = [1] * (len(mult) - 1) + [0] if len(mult) > 1 else [1]
    config = {
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
        **others,
    }
    return entries_of(UNetModel(**config), dtype)


def sd15(
    path,
    dtype=torch.float16,
    mult=(1, 2),
    blocks=1,
    vae_decoder_channels=32,
    clip_layers=12,
    seed=0,
    drop=(),
    metadata=None,
):
    """A whole SD 1.5 checkpoint: UNet, CLIP-L and VAE.

    The core asks for 320 model channels, a context of 768 and convolutions around the attention; how many levels and
    blocks there are it reads from the file.  ``mult=(1, 2, 4, 4), blocks=2, vae_decoder_channels=128`` is the real
    thing (2.1 GB), the default 0.5 GB, half of it CLIP-L's."""
    entries = _prefixed(_sd15_unet(dtype, mult, blocks), "model.diffusion_model.")
    clip = _clip_l(dtype, clip_layers)
    clip.pop("text_projection.weight")  # real SD 1.5 files have none
    entries.update(_prefixed(clip, "cond_stage_model.transformer."))
    entries.update(_prefixed(_sd_vae(dtype, 4, vae_decoder_channels, True), "first_stage_model."))
    return write(path, entries, seed, metadata, drop)


def sd15_unet(path, dtype=torch.float16, mult=(1, 2), blocks=1, seed=0, drop=(), metadata=None):
    """The UNet alone."""
    return write(path, _sd15_unet(dtype, mult, blocks), seed, metadata, drop)


SMALL_CLIP_VISION = {
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "image_size": 224,
    "intermediate_size": 128,
    "model_type": "clip_vision_model",
    "num_attention_heads": 4,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}


def unclip(path, dtype=torch.float16, mult=(1,), blocks=1, seed=0, drop=(), metadata=None):
    """An SD 2.1 unCLIP: a UNet and a CLIP vision model, no text encoder and no VAE.  The vision model is narrower than
    the core knows it; the file loads inside small_clip_vision()."""
    from comfy.clip_model import CLIPVisionModelProjection

    others = {"context_dim": 1024, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
    adm = {"num_classes": "sequential", "adm_in_channels": 1536}
    entries = _prefixed(_sd15_unet(dtype, mult, blocks, **others, **adm), "model.diffusion_model.")
    with torch.device("meta"):
        vision = CLIPVisionModelProjection(SMALL_CLIP_VISION, torch.float32, "meta", OPS)
    entries.update(entries_of(vision, dtype, "embedder.model.visual."))
    return write(path, entries, seed, metadata, drop)


@contextlib.contextmanager
def small_clip_vision():
    """While this lasts, the core builds CLIP vision models as narrow as SMALL_CLIP_VISION."""
    import comfy.clip_vision

    plain = comfy.clip_vision.ClipVisionModel

    class SmallClipVision(plain):
        def __init__(self, json_config):
            with tempfile.TemporaryDirectory() as folder:
                small = os.path.join(folder, "small.json")
                with open(small, "w", encoding="utf-8") as file:
                    json.dump(SMALL_CLIP_VISION, file)
                super().__init__(small)

    comfy.clip_vision.ClipVisionModel = SmallClipVision
    try:
        yield
    finally:
        comfy.clip_vision.ClipVisionModel = plain


# --- text encoders ----------------------------------------------------------------------------------------------------

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}
T5_BASE = {
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "dense_act_fn": "relu",
    "is_gated_act": False,
    "model_type": "t5",
    "num_heads": 12,
    "num_layers": 12,
    "vocab_size": 32128,
}
T5XXL_SMALL = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 64,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "t5",
    "num_heads": 2,
    "num_layers": 24,
    "vocab_size": 32128,
}
# model_options with which the core's loaders build the smaller sizes
T5XXL_SMALL_OPTIONS = {"t5xxl_model_config": {name: T5XXL_SMALL[name] for name in ("d_model", "num_heads")}}


def small_options(clip_layers=None, t5_layers=None, qwen_layers=None):
    """model_options (te_model_options for checkpoints) for files with fewer layers than the published ones.

    Make them anew for each load: the core writes into them."""
    out = {}
    if clip_layers is not None:
        out["clip_l_model_config"] = {"num_hidden_layers": clip_layers}
        out["model_config"] = {"num_hidden_layers": clip_layers}  # for text encoder files, which may be a Long-CLIP
    if t5_layers is not None:
        out["t5base_model_config"] = {"num_layers": t5_layers}
    if qwen_layers is not None:
        out["qwen3_06b_model_config"] = {"num_hidden_layers": qwen_layers}
    return out


def _clip_l(dtype, layers):
    from comfy.clip_model import CLIPTextModel

    return entries_of(CLIPTextModel({**CLIP_L, "num_hidden_layers": layers}, torch.float32, "meta", OPS), dtype)


def clip_l(path, dtype=torch.float16, layers=12, seed=0, drop=(), metadata=None):
    """CLIP-L, real size (246 MB in fp16).  With fewer layers it needs small_options(clip_layers=...)."""
    return write(path, _clip_l(dtype, layers), seed, metadata, drop)


def _t5(config, dtype):
    from comfy.text_encoders.t5 import T5

    entries = entries_of(T5(config, torch.float32, "meta", OPS), dtype)
    # T5 does not scale its attention scores, its queries' weights do
    for name in [name for name in entries if name.endswith("SelfAttention.q.weight")]:
        shape, kind, mean, std = entries[name]
        entries[name] = (shape, kind, mean, std / math.sqrt(config["d_kv"]))
    return entries


def t5_base(path, dtype=torch.bfloat16, layers=12, seed=0, drop=(), metadata=None):
    """T5 base, real size (219 MB), which the core takes for Stable Audio's text encoder (CLIPType.STABLE_AUDIO)."""
    return write(path, _t5({**T5_BASE, "num_layers": layers}, dtype), seed, metadata, drop)


def t5xxl_small(path, dtype=torch.bfloat16, seed=0, drop=(), metadata=None):
    """A T5-XXL narrowed to 64 (100 MB): its 24 blocks and its d_ff are what the core knows it by.  Load it with
    model_options=T5XXL_SMALL_OPTIONS."""
    return write(path, _t5(T5XXL_SMALL, dtype), seed, metadata, drop)


def qwen3_06b(path, dtype=torch.bfloat16, layers=2, seed=0, drop=(), metadata=None):
    """A Qwen3 0.6B, as Anima's text encoder (374 MB with 2 layers, most of it embedding).  Load it with
    model_options=small_options(qwen_layers=2)."""
    from comfy.text_encoders.llama import Qwen3_06B

    module = Qwen3_06B({"num_hidden_layers": layers}, torch.float32, "meta", OPS)
    return write(path, entries_of(module, dtype), seed, metadata, drop)


# --- VAEs -------------------------------------------------------------------------------------------------------------


def _sd_vae(dtype, channels, decoder_channels, quant_conv):
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
    return write(path, _sd_vae(dtype, 4, decoder_channels, True), seed, metadata, drop)


def flux_vae(path, dtype=torch.bfloat16, decoder_channels=32, seed=0, drop=(), metadata=None):
    """Flux's ae: 16 latent channels, no quant_conv."""
    return write(path, _sd_vae(dtype, 16, decoder_channels, False), seed, metadata, drop)


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


# --- LoRAs and model patches ------------------------------------------------------------------------------------------


def lora(path, base, rank=4, dtype=torch.float16, match="", limit=None, alpha=None, seed=0, drop=(), metadata=None):
    """A LoRA for the diffusion model in the file ``base``, for its matrices whose name contains ``match``."""
    entries = {}
    names = [
        name
        for name, entry in read_header(base).items()
        if len(entry["shape"]) == 2 and name.endswith(".weight") and match in name
    ]
    for name in names[:limit]:
        rows, columns = read_header(base)[name]["shape"]
        stem = "diffusion_model." + name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        entries[f"{stem}.lora_up.weight"] = ((rows, rank), dtype, 0.0, 0.3 / math.sqrt(rank))
        entries[f"{stem}.lora_down.weight"] = ((rank, columns), dtype, 0.0, 1.0 / math.sqrt(columns))
        entries[f"{stem}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    return write(path, entries, seed, metadata, drop)


def _cheap(operations, device="meta"):
    """An op namespace whose layers are built on ``device`` even where a class forgets to pass it on."""
    return type(
        "Ops",
        (),
        {
            name: functools.partial(getattr(operations, name), device=device)
            for name in ("Linear", "RMSNorm", "LayerNorm", "Conv2d", "Conv3d", "GroupNorm")
        },
    )


def patch_uso(path, dtype=torch.bfloat16, hidden=3072, seed=0, drop=(), metadata=None):
    """USO's projector of SigLIP features (21 MB).  The core builds 3072 only; others load inside
    small_patches(uso_hidden=...)."""
    from comfy_extras.nodes_model_patch import SigLIPMultiFeatProjModel

    module = SigLIPMultiFeatProjModel(hidden_size=hidden, operations=_cheap(OPS))
    return write(path, entries_of(module, dtype, "feature_embedder."), seed, metadata, drop)


def patch_qwen_diffsynth(
    path, dtype=torch.bfloat16, dim=3072, layers=60, extra_channels=0, seed=0, drop=(), metadata=None
):
    """A Qwen-Image DiffSynth control net.  The core builds (3072, 60) only, 2.3 GB in bf16; smaller files load inside
    small_patches(qwen_dim=..., qwen_layers=...)."""
    from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet

    module = QwenImageBlockWiseControlNet(
        num_layers=layers, dim=dim, additional_in_dim=extra_channels, device="meta", operations=_cheap(OPS)
    )
    return write(path, entries_of(module, dtype), seed, metadata, drop)


def patch_z_image_control(path, dtype=torch.bfloat16, dim=3840, layers=6, seed=0, drop=(), metadata=None):
    """A Z-Image Fun control net, split q, k and v as in the published file; with 3 or 15 layers one of the later
    kind, for inpainting too.  The core builds a width of 3840 only, 3.1 GB; others load inside
    small_patches(z_dim=...)."""
    from comfy.ldm.lumina.controlnet import ZImage_Control

    module = ZImage_Control(
        dim=dim,
        n_heads=dim // 128,
        n_kv_heads=dim // 128,
        n_control_layers=layers,
        additional_in_dim=0 if layers == 6 else 17,
        refiner_control=layers != 6,
        device="meta",
        dtype=torch.float32,
        operations=OPS,
    )
    published = (
        ("attention.out.", "attention.to_out.0."),
        ("attention.k_norm.", "attention.norm_k."),
        ("attention.q_norm.", "attention.norm_q."),
    )
    entries = {}
    for name, (shape, kind, mean, std) in entries_of(module, dtype).items():
        if name.endswith("attention.qkv.weight"):
            for letter in "qkv":
                entries[name.replace(".qkv.", f".to_{letter}.")] = ((shape[0] // 3, shape[1]), kind, mean, std)
            continue
        for ours, theirs in published:
            name = name.replace(ours, theirs)
        entries[name] = (shape, kind, mean, std)
    return write(path, entries, seed, metadata, drop)


def patch_wan_uni3c(
    path, dtype=torch.bfloat16, dim=128, ffn=256, layers=2, wan_dim=256, in_channels=36, seed=0, drop=(), metadata=None
):
    """A Uni3C control net for a Wan of width ``wan_dim``, with separate to_q, to_k, to_v as published.  The core reads
    all its sizes from the file, but always builds 16 heads."""
    from comfy.ldm.wan.uni3c import WanUni3CControlnet

    module = WanUni3CControlnet(
        in_channels=in_channels,
        conv_out_dim=wan_dim,
        dim=dim,
        ffn_dim=ffn,
        num_layers=layers,
        time_embed_dim=wan_dim,
        out_proj_dim=wan_dim,
        mid_channels=32,
        device="meta",
        dtype=torch.float32,
        operations=OPS,
    )
    names = {
        ".self_attn.q.": ".self_attn.to_q.",
        ".self_attn.k.": ".self_attn.to_k.",
        ".self_attn.v.": ".self_attn.to_v.",
        ".self_attn.o.": ".self_attn.to_out.0.",
    }

    def rename(name):
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        return name

    return write(path, entries_of(module, dtype, rename=rename), seed, metadata, drop)


def patch_anima_lllite(path, dtype=torch.bfloat16, dim=64, blocks=2, cond=32, mlp=16, seed=0, drop=(), metadata=None):
    """An Anima LLLite; the core reads all its sizes from the file."""
    from comfy.ldm.anima.lllite import AnimaLLLite

    stub = {
        "lllite_conditioning1.conv1.weight": torch.empty(cond // 2, 3, 4, 4, device="meta"),
        "lllite_conditioning1.conv3.weight": torch.empty(cond, cond // 2, 4, 4, device="meta"),
        "lllite_conditioning1.proj.weight": torch.empty(cond, cond, 1, 1, device="meta"),
        "lllite_conditioning1.resblocks.1.conv1.weight": torch.empty(cond, cond, 3, 3, device="meta"),
    }
    for block in range(blocks):
        for layer in ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "cross_attn_q_proj", "mlp_layer1"):
            stub[f"lllite_dit_blocks_{block}_{layer}.down.weight"] = torch.empty(mlp, dim, device="meta")
            stub[f"lllite_dit_blocks_{block}_{layer}.cond_to_film.weight"] = torch.empty(2 * mlp, cond, device="meta")
    module = AnimaLLLite(stub, metadata, device="meta", dtype=torch.float32, operations=OPS)
    return write(path, entries_of(module, dtype), seed, metadata, drop)


@contextlib.contextmanager
def small_patches(qwen_dim=None, qwen_layers=None, z_dim=None, uso_hidden=None):
    """While this lasts, the core builds the patches of fixed size in other sizes.

    It replaces the classes where ModelPatchLoader looks them up: a loader of one's own takes part if it does that too.
    """
    import comfy.ldm.lumina.controlnet as lumina
    import comfy_extras.nodes_model_patch as nodes_model_patch

    saved = (
        nodes_model_patch.QwenImageBlockWiseControlNet,
        nodes_model_patch.SigLIPMultiFeatProjModel,
        lumina.ZImage_Control,
    )

    class SmallQwen(saved[0]):
        def __init__(self, **kwargs):
            sizes = {"dim": qwen_dim, "num_layers": qwen_layers}
            super().__init__(**{**{name: size for name, size in sizes.items() if size is not None}, **kwargs})

    class SmallUSO(saved[1]):
        def __init__(self, **kwargs):
            super().__init__(**{**({} if uso_hidden is None else {"hidden_size": uso_hidden}), **kwargs})

    class SmallZ(saved[2]):
        def __init__(self, **kwargs):
            sizes = {} if z_dim is None else {"dim": z_dim, "n_heads": z_dim // 128, "n_kv_heads": z_dim // 128}
            super().__init__(**{**sizes, **kwargs})

    def put(qwen, uso, z_image):
        nodes_model_patch.QwenImageBlockWiseControlNet, nodes_model_patch.SigLIPMultiFeatProjModel = qwen, uso
        lumina.ZImage_Control = z_image

    put(SmallQwen, SmallUSO, SmallZ)
    try:
        yield
    finally:
        put(*saved)


# --- files that are wrong ---------------------------------------------------------------------------------------------


def truncated(path, keep=0.6, build=flux, **options):
    """A good header, but the data end early (as after a broken download)."""
    build(path, **options)
    os.truncate(path, int(os.path.getsize(path) * keep))
    return str(path)


def wrong_header(path, kind="json", build=flux, **options):
    """``kind``: "length" (beyond the file), "huge" (an absurd length), "json" (not JSON), "not_a_dict", "offsets"
    (beyond the data), "overlap" (two tensors on the same bytes), "size" (shape and bytes disagree), "dtype" (unknown),
    "negative" (a negative offset), or "short" (fewer than 8 bytes)."""
    build(path, **options)
    with open(path, "rb") as file:
        data = file.read()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    first, second = [name for name in header if name != "__metadata__"][:2]
    size = None
    if kind == "length":
        size = len(data) + 1000
    elif kind == "huge":
        size = 2**63
    elif kind == "offsets":
        header[first]["data_offsets"] = [len(body) + 64, len(body) + 64 + header[first]["data_offsets"][1]]
    elif kind == "overlap":
        begin, end = header[second]["data_offsets"]
        header[second]["data_offsets"] = [begin - 2, end - 2]
    elif kind == "size":
        header[first]["shape"] = [*header[first]["shape"], 3]
    elif kind == "dtype":
        header[first]["dtype"] = "F12"
    elif kind == "negative":
        begin, end = header[first]["data_offsets"]
        header[first]["data_offsets"] = [begin - 8, end - 8]
    elif kind not in ("json", "not_a_dict", "short"):
        raise ValueError(f"unknown kind {kind!r}")
    text = {"json": b'{"a": [1, 2', "not_a_dict": b"[1, 2, 3]"}.get(kind) or json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(data[:5] if kind == "short" else struct.pack("<Q", size or len(text)) + text + body)
    return str(path)


def not_a_model(path, kind="tensors"):
    """``kind``: "tensors" (valid, but no known model), "none" (valid, no tensors), "empty" (no bytes), "text", or
    "html" (an error page saved under the model's name)."""
    if kind in ("tensors", "none"):
        names = {"tensors": ("alpha.weight", "beta.weight"), "none": ()}[kind]
        return write(path, {name: ((16, 16), torch.float32, 0.0, 1.0) for name in names})
    text = {
        "empty": b"",
        "text": b"this is not a model\n" * 40,
        "html": b"<!DOCTYPE html><html><body>404: not found</body></html>\n" * 20,
    }[kind]
    with open(path, "wb") as file:
        file.write(text)
    return str(path)


def missing_key(path, key, build=flux, **options):
    """A good file without the tensor ``key``."""
    build(path, drop=(key,), **options)
    return str(path)
