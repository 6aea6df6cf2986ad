"""Transformers that make images."""

import dataclasses

import torch
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .table import Entry, tensor
from .videos import COSMOS2

# ComfyUI 0.22 has one way of numbering the words of a text.
NUMBERED = {
    field.name: False for field in dataclasses.fields(ChromaRadianceParams) if field.name == "use_sequential_txt_ids"
}
FLUX = dict(
    in_channels=16,
    out_channels=16,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[16, 56, 56],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    txt_ids_dims=[],
)

LUMINA = dict(
    patch_size=2,
    in_channels=16,
    dim=2304,
    cap_feat_dim=2304,
    n_layers=2,
    qk_norm=True,
    n_heads=24,
    n_kv_heads=8,
    axes_dims=[32, 32, 32],
    axes_lens=[300, 512, 512],
)

Z = dict(
    patch_size=2,
    in_channels=16,
    dim=3840,
    cap_feat_dim=2560,
    n_layers=2,
    qk_norm=True,
    n_heads=30,
    n_kv_heads=30,
    axes_dims=[32, 48, 48],
    axes_lens=[1536, 512, 512],
    rope_theta=256.0,
    ffn_dim_multiplier=(8.0 / 3.0),
    z_image_modulation=True,
    time_scale=1000.0,
    pad_tokens_multiple=32,
)

STEP = (1, 4, 64, 64)


def hidream_o1(model, x):
    from comfy.ldm.hidream_o1.conditioning import build_extra_conds

    with unset_fake_temporarily():
        conds = build_extra_conds(torch.ones(1, 32, dtype=torch.long), torch.zeros(x.shape))
    model.diffusion_model._kv_cache_entries = []  # the cache compares numbers
    return model.apply_model(x, tensor(1) + 0.5, **conds)


MODELS = {
    "SD3": Entry(
        dict(
            patch_size=2,
            depth=2,
            num_patches=192 * 192,
            pos_embed_max_size=192,
            adm_in_channels=2048,
            qk_norm="rms",
            context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
            x_block_self_attn_layers=[0],
        ),
        (1, 16, 64, 64),
        (1, 154, 4096),
        y=(1, 2048),
    ),
    "AuraFlow": Entry(dict(n_double_layers=2, n_layers=4, max_seq=9216), STEP, (1, 256, 2048)),
    "PixArtAlpha": Entry(
        dict(depth=2, micro_condition=True, input_size=128, pe_interpolation=2),
        STEP,
        (1, 120, 4096),
        c_size=(1, 2),
        c_ar=(1, 1),
    ),
    "PixArtSigma": Entry(
        dict(depth=2, micro_condition=False, input_size=128, pe_interpolation=2, model_max_length=300),
        STEP,
        (1, 300, 4096),
    ),
    "HunyuanDiT": Entry(
        dict(depth=4, hidden_size=1408, mlp_ratio=4.3637),
        STEP,
        (1, 77, 1024),
        text_embedding_mask=(1, 77),
        encoder_hidden_states_t5=(1, 256, 2048),
        text_embedding_mask_t5=(1, 256),
        image_meta_size=(1, 6),
    ),
    "HunyuanDiT1": Entry(
        dict(depth=4, hidden_size=1408, mlp_ratio=4.3637, size_cond=True, use_style_cond=True),
        STEP,
        (1, 77, 1024),
        text_embedding_mask=(1, 77),
        encoder_hidden_states_t5=(1, 256, 2048),
        text_embedding_mask_t5=(1, 256),
        image_meta_size=(1, 6),
    ),
    "FluxInpaint": Entry(
        dict(FLUX, in_channels=96), (1, 16, 64, 64), (1, 256, 4096), c_concat=(1, 80, 64, 64), y=(1, 768), guidance=(1,)
    ),
    "Flux": Entry(FLUX, (1, 16, 64, 64), (1, 256, 4096), y=(1, 768), guidance=(1,)),
    "FluxSchnell": Entry(FLUX, (1, 16, 64, 64), (1, 256, 4096), y=(1, 768)),
    "LongCatImage": Entry(
        dict(FLUX, context_in_dim=3584, vec_in_dim=None, txt_ids_dims=[1, 2]), (1, 16, 64, 64), (1, 256, 3584)
    ),
    "Flux2": Entry(
        dict(
            FLUX,
            in_channels=128,
            out_channels=128,
            context_in_dim=15360,
            hidden_size=6144,
            num_heads=48,
            patch_size=1,
            mlp_ratio=3.0,
            axes_dim=[32, 32, 32, 32],
            theta=2000,
            txt_ids_dims=[3],
            qkv_bias=False,
            ops_bias=False,
            global_modulation=True,
            mlp_silu_act=True,
            vec_in_dim=None,
            guidance_embed=True,
            yak_mlp=False,
            txt_norm=False,
        ),
        (1, 128, 32, 32),
        (1, 256, 15360),
        guidance=(1,),
    ),
    "Anima": Entry(dict(COSMOS2, in_channels=16), (1, 16, 1, 32, 32), (1, 512, 1024)),
    "Lumina2": Entry(LUMINA, (1, 16, 64, 64), (1, 64, 2304), num_tokens=64, attention_mask=(1, 64)),
    "ZImage": Entry(Z, (1, 16, 64, 64), (1, 64, 2560), num_tokens=64, attention_mask=(1, 64)),
    "ZImagePixelSpace": Entry(
        dict(Z, patch_size=32, in_channels=3, decoder_hidden_size=3840, decoder_num_res_blocks=2, decoder_max_freqs=8),
        (1, 3, 256, 256),
        (1, 64, 2560),
        num_tokens=64,
        attention_mask=(1, 64),
    ),
    "PixelDiTT2I": Entry(dict(patch_depth=2, pixel_depth=2), (1, 3, 128, 128), (1, 300, 2304)),
    "PiD": Entry(
        dict(patch_depth=2, pixel_depth=2, lq_hidden_dim=512),
        (1, 3, 128, 128),
        (1, 300, 2304),
        lq_latent=(1, 16, 4, 4),
        degrade_sigma=(1,),
    ),
    "HiDream": Entry(
        dict(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=128,
            num_attention_heads=20,
            caption_channels=[4096, 4096],
            text_emb_dim=2048,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(64, 32, 32),
            max_resolution=(128, 128),
            llama_layers=[0, 1, 2, 3],
        ),
        (1, 16, 64, 64),
        (1, 128, 4096),
        y=(1, 2048),
        encoder_hidden_states_llama3=(1, 4, 128, 4096),
    ),
    "HiDreamO1": Entry(
        dict(text_config_overrides={"num_hidden_layers": 2}, vision_config_overrides={"depth": 2}),
        (1, 3, 128, 128),
        None,
        call=hidream_o1,
    ),
    "Chroma": Entry(
        dict(FLUX, out_dim=3072, hidden_dim=5120, n_layers=5, in_dim=64, in_channels=64, out_channels=64),
        (1, 16, 64, 64),
        (1, 256, 4096),
        guidance=(1,),
    ),
    "ChromaRadiance": Entry(
        dict(
            FLUX,
            out_dim=3072,
            hidden_dim=5120,
            n_layers=5,
            in_dim=64,
            in_channels=3,
            out_channels=3,
            patch_size=16,
            nerf_hidden_size=64,
            nerf_mlp_ratio=4,
            nerf_depth=4,
            nerf_max_freqs=8,
            nerf_tile_size=512,
            nerf_final_head_type="conv",
            nerf_embedder_dtype=torch.float32,
            use_x0=False,
            **NUMBERED,
        ),
        (1, 3, 128, 128),
        (1, 256, 4096),
        guidance=(1,),
    ),
    "Omnigen2": Entry(
        dict(
            num_layers=2,
            hidden_size=2520,
            num_attention_heads=21,
            num_kv_heads=7,
            axes_dim_rope=(40, 40, 40),
            axes_lens=(1024, 1664, 1664),
            text_feat_dim=2048,
        ),
        (1, 16, 64, 64),
        (1, 64, 2048),
        num_tokens=64,
    ),
    "Boogu": Entry(dict(num_layers=4, num_double_stream_layers=2), (1, 16, 64, 64), (1, 64, 4096), num_tokens=64),
    "MageFlow": Entry(dict(num_layers=2), (1, 128, 32, 32), (1, 64, 2560)),
    "QwenImage": Entry(dict(in_channels=64, num_layers=2), (1, 16, 1, 64, 64), (1, 64, 3584)),
    "JoyImage": Entry(dict(num_layers=2), (1, 16, 1, 64, 64), (1, 64, 4096)),
    "Ideogram4": Entry(dict(num_layers=2), (1, 128, 32, 32), (1, 64, 53248)),
    "Krea2": Entry(dict(layers=2), (1, 16, 64, 64), (1, 64, 12 * 2560)),
    "Lens": Entry(dict(num_layers=2), (1, 128, 32, 32), (1, 64, 4 * 2880)),
    "ErnieImage": Entry(dict(num_layers=2), (1, 128, 32, 32), (1, 64, 3072)),
}
