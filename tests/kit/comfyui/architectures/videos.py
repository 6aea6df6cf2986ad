"""Transformers that make videos, and those that share their modules."""

from torch._subclasses.fake_tensor import unset_fake_temporarily

from .table import Entry, packed

HUNYUAN = dict(
    in_channels=16,
    out_channels=16,
    patch_size=[1, 2, 2],
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[16, 56, 56],
    theta=256,
    qkv_bias=True,
    guidance_embed=True,
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)

HUNYUAN_IMAGE = dict(HUNYUAN, context_in_dim=3584, byt5=True, guidance_embed=False, in_channels=64, out_channels=64)

COSMOS = dict(
    max_img_h=240,
    max_img_w=240,
    max_frames=128,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=4096,
    block_config="FA-CA-MLP",
    concat_padding_mask=True,
    pos_emb_cls="rope3d",
    block_x_format="THWBD",
    affline_emb_norm=True,
    use_adaln_lora=True,
    adaln_lora_dim=256,
    num_blocks=2,
    num_heads=32,
    extra_per_block_abs_pos_emb=True,
    rope_t_extrapolation_ratio=2.0,
    extra_per_block_abs_pos_emb_type="learnable",
)

COSMOS2 = dict(
    max_img_h=240,
    max_img_w=240,
    max_frames=128,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=2048,
    concat_padding_mask=True,
    crossattn_emb_channels=1024,
    pos_emb_cls="rope3d",
    num_blocks=2,
    num_heads=16,
    use_adaln_lora=True,
    adaln_lora_dim=256,
)


def wan(**others):
    return (
        dict(
            dim=2048,
            out_dim=16,
            num_heads=16,
            ffn_dim=8192,
            num_layers=2,
            patch_size=(1, 2, 2),
            freq_dim=256,
            window_size=(-1, -1),
            qk_norm=True,
            cross_attn_norm=True,
            eps=1e-6,
            in_dim=16,
        )
        | others
    )


VIDEO = (1, 16, 3, 32, 32)

VISION = (1, 257, 1280)

H3 = [(1, 24, 3, 32, 32), (1, 32, 2, 16)]

LTX = [(1, 128, 3, 16, 16), (1, 8, 126, 16)]


def h3_layout():
    from comfy.ldm.minimax.model import PackedLayout

    (_, _, frames, height, width), (*_, seconds) = H3
    with unset_fake_temporarily():
        return {"layout": PackedLayout(64, frames, height, width, seconds)}


MODELS = {
    "GenmoMochi": Entry(
        dict(
            depth=2,
            in_channels=12,
            patch_size=2,
            hidden_size_x=3072,
            hidden_size_y=1536,
            num_heads=24,
            mlp_ratio_x=4.0,
            mlp_ratio_y=4.0,
            learn_sigma=False,
            use_extended_posenc=False,
            posenc_preserve_area=True,
            rope_theta=10000.0,
            t5_feat_dim=4096,
            t5_token_length=256,
            qkv_bias=False,
            out_bias=True,
            attn_drop=0.0,
            qk_norm=True,
            use_t5=True,
            timestep_mlp_bias=True,
            timestep_scale=1000.0,
        ),
        (1, 12, 3, 32, 32),
        (1, 256, 4096),
        attention_mask=(1, 256),
        num_tokens=256,
    ),
    "LTXV": Entry(dict(num_layers=2), (1, 128, 3, 16, 16), (1, 128, 4096), attention_mask=(1, 128), frame_rate=25),
    "MiniMaxH3": Entry(dict(num_layers=2), packed(H3), (1, 64, 5120), latent_shapes=H3, minimax_payload=h3_layout),
    "HunyuanVideo": Entry(HUNYUAN, VIDEO, (1, 256, 4096), y=(1, 768), guidance=(1,)),
    "HunyuanVideoI2V": Entry(
        dict(HUNYUAN, in_channels=33), VIDEO, (1, 256, 4096), y=(1, 768), guidance=(1,), c_concat=(1, 17, 3, 32, 32)
    ),
    "HunyuanVideoSkyreelsI2V": Entry(
        dict(HUNYUAN, in_channels=32), VIDEO, (1, 256, 4096), y=(1, 768), guidance=(1,), c_concat=VIDEO
    ),
    "HunyuanVideo15": Entry(
        dict(
            HUNYUAN,
            in_channels=65,
            out_channels=32,
            vec_in_dim=None,
            context_in_dim=3584,
            hidden_size=2048,
            num_heads=16,
            guidance_embed=False,
            byt5=True,
            use_cond_type_embedding=True,
            patch_size=[1, 1, 1],
            depth_single_blocks=0,
            vision_in_dim=1152,
        ),
        (1, 32, 3, 16, 16),
        (1, 128, 3584),
        c_concat=(1, 33, 3, 16, 16),
        txt_byt5=(1, 64, 1472),
        clip_fea=(1, 729, 1152),
    ),
    "HunyuanVideo15_SR_Distilled": Entry(
        dict(
            HUNYUAN,
            in_channels=98,
            out_channels=32,
            vec_in_dim=None,
            context_in_dim=3584,
            hidden_size=2048,
            num_heads=16,
            guidance_embed=False,
            byt5=True,
            use_cond_type_embedding=True,
            patch_size=[1, 1, 1],
            depth_single_blocks=0,
            vision_in_dim=1152,
        ),
        (1, 32, 3, 16, 16),
        (1, 128, 3584),
        c_concat=(1, 66, 3, 16, 16),
        txt_byt5=(1, 64, 1472),
        clip_fea=(1, 729, 1152),
    ),
    "HunyuanImage21": Entry(
        dict(HUNYUAN_IMAGE, patch_size=[1, 1], axes_dim=[64, 64]),
        (1, 64, 32, 32),
        (1, 128, 3584),
        txt_byt5=(1, 64, 1472),
    ),
    "HunyuanImage21Refiner": Entry(
        dict(
            HUNYUAN,
            in_channels=128,
            out_channels=64,
            patch_size=[1, 1, 1],
            context_in_dim=3584,
            guidance_embed=True,
            vec_in_dim=None,
        ),
        (1, 64, 3, 16, 16),
        (1, 128, 3584),
        c_concat=(1, 64, 3, 16, 16),
        guidance=(1,),
    ),
    "CosmosT2V": Entry(dict(COSMOS, in_channels=16), VIDEO, (1, 512, 1024), fps=24.0),
    "CosmosI2V": Entry(dict(COSMOS, in_channels=17), VIDEO, (1, 512, 1024), fps=24.0, c_concat=(1, 1, 3, 32, 32)),
    "CosmosT2IPredict2": Entry(dict(COSMOS2, in_channels=16), (1, 16, 1, 32, 32), (1, 512, 1024)),
    "CosmosI2VPredict2": Entry(
        dict(COSMOS2, in_channels=17),
        VIDEO,
        (1, 512, 1024),
        fps=16.0,
        condition_video_input_mask_B_C_T_H_W=None,
        c_concat=(1, 1, 3, 32, 32),
    ),
    "WAN21_T2V": Entry(wan(), VIDEO, (1, 512, 4096)),
    "WAN21_FlowRVS": Entry(wan(), VIDEO, (1, 512, 4096)),
    "WAN21_CausalAR_T2V": Entry(wan(), VIDEO, (1, 512, 4096)),
    "WAN22_T2V": Entry(wan(in_dim=48, out_dim=48, dim=3072, num_heads=24), (1, 48, 3, 16, 16), (1, 512, 4096)),
    "WAN21_I2V": Entry(wan(in_dim=36), VIDEO, (1, 512, 4096), c_concat=(1, 20, 3, 32, 32), clip_fea=VISION),
    "WAN21_FunControl2V": Entry(wan(in_dim=48), VIDEO, (1, 512, 4096), c_concat=(1, 32, 3, 32, 32), clip_fea=VISION),
    "WAN21_Vace": Entry(
        wan(vace_layers=1, vace_in_dim=96),
        VIDEO,
        (1, 512, 4096),
        vace_context=(1, 1, 96, 3, 32, 32),
        vace_strength=[1.0],
    ),
    "WAN21_Camera": Entry(
        wan(in_dim=32), VIDEO, (1, 512, 4096), c_concat=VIDEO, clip_fea=VISION, camera_conditions=(1, 24, 3, 256, 256)
    ),
    "WAN22_Camera": Entry(
        wan(in_dim=36), VIDEO, (1, 512, 4096), c_concat=(1, 20, 3, 32, 32), camera_conditions=(1, 24, 3, 256, 256)
    ),
    "WAN22_S2V": Entry(
        wan(num_layers=5),
        VIDEO,
        (1, 512, 4096),
        audio_embed=(1, 25, 1024, 12),
        reference_latent=(1, 16, 1, 32, 32),
        control_video=VIDEO,
        reference_motion=(1, 16, 19, 32, 32),
    ),
    "WAN21_HuMo": Entry(
        wan(in_dim=36),
        VIDEO,
        (1, 512, 4096),
        audio_embed=(1, 3, 8, 5, 1280),
        reference_latent=(1, 36, 1, 32, 32),
        c_concat=(1, 20, 3, 32, 32),
    ),
    "WAN22_Animate": Entry(
        wan(in_dim=36, num_layers=5),
        VIDEO,
        (1, 512, 4096),
        c_concat=(1, 20, 3, 32, 32),
        clip_fea=VISION,
        pose_latents=VIDEO,
        face_pixel_values=(1, 3, 9, 512, 512),
    ),
    "WAN_Animate2": Entry(wan(in_dim=36), VIDEO, (1, 512, 4096), c_concat=(1, 20, 3, 32, 32), clip_fea=VISION),
    "WAN21_SCAIL": Entry(
        wan(in_dim=20),
        (1, 16, 3, 32, 32),
        (1, 512, 4096),
        c_concat=(1, 4, 3, 32, 32),
        clip_fea=VISION,
        pose_latents=(1, 20, 3, 16, 16),
        reference_latent=(1, 20, 1, 32, 32),
    ),
    "WAN21_SCAIL2": Entry(
        wan(in_dim=20, mask_in_dim=28),
        (1, 16, 3, 32, 32),
        (1, 512, 4096),
        c_concat=(1, 4, 3, 32, 32),
        clip_fea=VISION,
        pose_latents=(1, 20, 3, 16, 16),
        reference_latent=(1, 20, 1, 32, 32),
    ),
    "WAN22_WanDancer": Entry(
        wan(in_dim=36, num_layers=5),
        VIDEO,
        (1, 512, 4096),
        c_concat=(1, 20, 3, 32, 32),
        clip_fea=VISION,
        audio_embed=(1, 60, 35),
    ),
    "SeedVR2": Entry(
        dict(vid_dim=2560, heads=20, num_layers=4, norm_eps=1e-5, mlp_type="swiglu", vid_out_norm=True, mm_layers=2),
        (2, 16, 3, 16, 16),
        (2, 58, 5120),
        condition=(2, 17, 3, 16, 16),
    ),
    "Kandinsky5": Entry(
        dict(num_visual_blocks=2, model_dim=1792), VIDEO, (1, 64, 3584), y=(1, 768), c_concat=(1, 17, 3, 32, 32)
    ),
    "Kandinsky5Image": Entry(dict(num_visual_blocks=2), (1, 16, 1, 32, 32), (1, 64, 3584), y=(1, 768)),
    "CogVideoX_T2V": Entry(
        dict(num_attention_heads=48, num_layers=2, use_rotary_positional_embeddings=True), VIDEO, (1, 226, 4096)
    ),
    "CogVideoX_I2V": Entry(
        dict(
            num_attention_heads=48,
            num_layers=2,
            use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True,
        ),
        VIDEO,
        (1, 226, 4096),
        c_concat=VIDEO,
    ),
    "CogVideoX_Inpaint": Entry(
        dict(num_attention_heads=48, num_layers=2, use_rotary_positional_embeddings=True),
        VIDEO,
        (1, 226, 4096),
        c_concat=(1, 32, 3, 32, 32),
    ),
    "LTXAV": Entry(
        dict(num_layers=2), packed(LTX), (1, 128, 2 * 3840), latent_shapes=LTX, attention_mask=(1, 128), frame_rate=25
    ),
}
