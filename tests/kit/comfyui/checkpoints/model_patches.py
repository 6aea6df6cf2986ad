"""Control nets and projectors that ComfyUI's ModelPatchLoader reads."""

import contextlib
import functools

import torch

from .writing import OPS, entries_of, write

SMALL_USO = 128  # the width of a narrow Flux that takes its features, for patch_uso and small_patches


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


def patch_uso(path, dtype=torch.bfloat16, hidden=3072, places=729, width=1152, seed=0, drop=(), metadata=None):
    """USO's projector of the features of a SigLIP of these `places` and this `width` (21 MB).  ComfyUI builds one size
    only; others load inside small_patches(uso_hidden=..., uso_siglip=(places, width))."""
    from comfy_extras.nodes_model_patch import SigLIPMultiFeatProjModel

    sizes = {"siglip_token_nums": places, "siglip_token_dims": width, "hidden_size": hidden}
    module = SigLIPMultiFeatProjModel(**sizes, operations=_cheap(OPS))
    return write(path, entries_of(module, dtype, "feature_embedder."), seed, metadata, drop)


def patch_qwen_diffsynth(
    path, dtype=torch.bfloat16, dim=3072, layers=60, extra_channels=0, seed=0, drop=(), metadata=None
):
    """A Qwen-Image DiffSynth control net.  ComfyUI builds (3072, 60) only, 2.3 GB in bf16; smaller files load inside
    small_patches(qwen_dim=..., qwen_layers=...)."""
    from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet

    module = QwenImageBlockWiseControlNet(
        num_layers=layers, dim=dim, additional_in_dim=extra_channels, device="meta", operations=_cheap(OPS)
    )
    return write(path, entries_of(module, dtype), seed, metadata, drop)


def patch_z_image_control(path, dtype=torch.bfloat16, dim=3840, layers=6, seed=0, drop=(), metadata=None):
    """A Z-Image Fun control net, split q, k and v as in the published file; with 3 or 15 layers one of the later
    kind, for inpainting too.  ComfyUI builds a width of 3840 only, 3.1 GB; others load inside
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
    """A Uni3C control net for a Wan of width ``wan_dim``, with separate to_q, to_k, to_v as published.  ComfyUI reads
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
    """An Anima LLLite; ComfyUI reads all its sizes from the file."""
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
def small_patches(qwen_dim=None, qwen_layers=None, z_dim=None, uso_hidden=None, uso_siglip=(None, None)):
    """While this lasts, ComfyUI builds the patches of fixed size in other sizes.

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
            places, width = uso_siglip
            sizes = {"hidden_size": uso_hidden, "siglip_token_nums": places, "siglip_token_dims": width}
            super().__init__(**{**{name: size for name, size in sizes.items() if size is not None}, **kwargs})

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
