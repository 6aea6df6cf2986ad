"""The diffusion models that ComfyUI supports: the settings that its files give them, and the tensors of one step.

Widths are the published ones. Depths are short where all blocks of a kind are alike.
"""

import comfy.supported_models
import torch

from .fake_card import CARD, store

COMPUTES_IN = torch.bfloat16
STORED_IN = torch.float32


def build(name):
    """Return the model of that name, with its weights in host memory, and a function that runs one step of it."""
    found = next(model for model in comfy.supported_models.models if model.__name__ == name)
    entry = MODELS[name]
    settings = {**found.unet_config, **entry.settings}
    config = found(settings)
    config.set_inference_dtype(COMPUTES_IN, None)
    model = config.get_model({}, "", device="meta")
    store(model, STORED_IN)
    return model, entry.step


def tensor(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=CARD)


class Entry:
    """settings: beside those that `supported_models` names. x, context: shapes. others: name -> shape or value."""

    def __init__(self, settings, x, context=None, call=None, **others):
        self.settings, self.x, self.context, self.others, self.call = settings, x, context, others, call

    def step(self, model):
        others = {
            name: tensor(*value) if isinstance(value, tuple) else value() if callable(value) else value
            for name, value in self.others.items()
        }
        x = tensor(*self.x)
        if self.call is not None:
            return self.call(model, x, others)
        context = tensor(*self.context) if self.context is not None else None
        return model.apply_model(x, tensor(self.x[0]) + 0.5, c_crossattn=context, transformer_options={}, **others)


UNET = dict(image_size=32, out_channels=4, use_spatial_transformer=True, legacy=False)
SD = dict(
    **UNET,
    in_channels=4,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1] * 9 + [0] * 3,
    transformer_depth_middle=1,
)
SD1 = dict(SD, num_heads=8, context_dim=768)
SD2 = dict(SD, num_head_channels=64, context_dim=1024)


def xl(down, middle, up, levels=3, channels=4, **others):
    return dict(
        UNET,
        in_channels=channels,
        num_res_blocks=[2] * levels if len(down) == 2 * levels else [1] * levels,
        channel_mult=[1, 2, 4, 4][:levels],
        num_head_channels=64,
        num_classes="sequential",
        transformer_depth=down,
        transformer_depth_middle=middle,
        transformer_depth_output=up,
        **others,
    )


XL = xl([0, 0, 2, 2, 10, 10], 10, [0, 0, 0, 2, 2, 2, 10, 10, 10])
VIDEO_UNET = dict(
    UNET,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    num_head_channels=64,
    num_classes="sequential",
    transformer_depth_output=[1] * 9 + [0] * 3,
    transformer_depth_middle=1,
    extra_ff_mix_layer=True,
    use_spatial_context=True,
    merge_strategy="learned_with_images",
    video_kernel_size=[3, 1, 1],
    use_temporal_resblock=True,
    disable_temporal_crossattention=False,
)
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


STEP = (1, 4, 64, 64)
VIDEO = (1, 16, 3, 32, 32)
VISION = (1, 257, 1280)


def ids(*shape):
    return lambda: tensor(*shape, dtype=torch.long)


MODELS = {
    "LotusD": Entry(dict(SD2, num_classes="sequential"), STEP, (1, 77, 1024), y=(1, 4)),
    "Stable_Zero123": Entry(SD1, STEP, (1, 1, 768), c_concat=STEP),
    "SD15_instructpix2pix": Entry(SD1, STEP, (1, 77, 768), c_concat=STEP),
    "SD15": Entry(SD1, STEP, (1, 77, 768)),
    "SD20": Entry(SD2, STEP, (1, 77, 1024)),
    "SD21UnclipL": Entry(dict(SD2, num_classes="sequential"), STEP, (1, 77, 1024), y=(1, 1536)),
    "SD21UnclipH": Entry(dict(SD2, num_classes="sequential"), STEP, (1, 77, 1024), y=(1, 2048)),
    "SDXL_instructpix2pix": Entry(XL, STEP, (1, 77, 2048), c_concat=STEP, y=(1, 2816)),
    "SDXLRefiner": Entry(
        xl([0, 0, 4, 4, 4, 4, 0, 0], 4, [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0], 4), STEP, (1, 77, 1280), y=(1, 2560)
    ),
    "SDXL": Entry(XL, STEP, (1, 77, 2048), y=(1, 2816)),
    "SSD1B": Entry(xl([0, 0, 2, 2, 4, 4], 0, [0, 0, 0, 1, 1, 2, 10, 4, 4]), STEP, (1, 77, 2048), y=(1, 2816)),
    "KOALA_700M": Entry(xl([0, 2, 5], -2, [0, 0, 2, 2, 5, 5]), STEP, (1, 77, 2048), y=(1, 2816)),
    "KOALA_1B": Entry(xl([0, 2, 6], 6, [0, 0, 2, 2, 6, 6]), STEP, (1, 77, 2048), y=(1, 2816)),
    "Segmind_Vega": Entry(xl([0, 0, 1, 1, 2, 2], 0, [0, 0, 0, 1, 1, 1, 2, 2, 2]), STEP, (1, 77, 2048), y=(1, 2816)),
    "SD_X4Upscaler": Entry(
        dict(
            SD2,
            num_classes=1000,
            num_heads=8,
            num_head_channels=-1,
            channel_mult=[1, 2, 2, 4],
            transformer_depth=[0, 0, 1, 1, 1, 1, 1, 1],
            transformer_depth_output=[1] * 9 + [0] * 3,
            disable_self_attentions=[True, True, True, False],
        ),
        STEP,
        (1, 77, 1024),
        c_concat=(1, 3, 64, 64),
        y=ids(1),
    ),
    "Stable_Cascade_C": Entry(
        dict(blocks=[[2, 2], [2, 2]]),
        (1, 16, 24, 24),
        None,
        clip_text=(1, 77, 1280),
        clip_text_pooled=(1, 1, 1280),
        clip_img=(1, 1, 768),
    ),
    "Stable_Cascade_B": Entry(
        dict(
            c_hidden=[320, 640, 1280, 1280],
            nhead=[-1, -1, 20, 20],
            blocks=[[1, 2, 2, 2], [2, 2, 2, 1]],
            block_repeat=[[1, 1, 1, 1], [3, 3, 2, 2]],
        ),
        (1, 4, 64, 64),
        None,
        effnet=(1, 16, 24, 24),
        clip=(1, 1, 1280),
    ),
    "SV3D_u": Entry(VIDEO_UNET, (2, 4, 32, 32), (2, 1, 1024), c_concat=(2, 4, 32, 32), y=(2, 256), num_video_frames=2),
    "SV3D_p": Entry(VIDEO_UNET, (2, 4, 32, 32), (2, 1, 1024), c_concat=(2, 4, 32, 32), y=(2, 1280), num_video_frames=2),
    "SVD_img2vid": Entry(
        VIDEO_UNET, (2, 4, 32, 32), (2, 1, 1024), c_concat=(2, 4, 32, 32), y=(2, 768), num_video_frames=2
    ),
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
    "StableAudio3": Entry(
        dict(
            global_cond_type="adaLN",
            global_cond_dim=1536,
            project_cond_tokens=True,
            embed_dim=1536,
            num_memory_tokens=64,
            attn_kwargs={"qk_norm": "rms", "differential": True},
            norm_type="rms_norm",
            num_heads=24,
            timestep_features_type="expo",
            io_channels=256,
            input_concat_dim=0,
            depth=2,
        ),
        (1, 256, 128),
        (1, 64, 768),
        global_embed=(1, 1536),
    ),
    "StableAudio": Entry(
        dict(
            global_cond_dim=1536,
            project_cond_tokens=False,
            embed_dim=1536,
            num_memory_tokens=0,
            timestep_features_type="learned",
            io_channels=64,
            input_concat_dim=0,
            depth=2,
        ),
        (1, 64, 256),
        (1, 130, 768),
        global_embed=(1, 1536),
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
            timestep_scale=1000.0,
            attend_to_padding=True,
        ),
        (1, 12, 3, 32, 32),
        (1, 256, 4096),
        attention_mask=(1, 256),
        num_tokens=256,
    ),
    "LTXV": Entry(dict(num_layers=2), (1, 128, 3, 16, 16), (1, 128, 4096), attention_mask=(1, 128), frame_rate=25),
    "MiniMaxH3": Entry(dict(num_layers=2), (1, 24, 3, 32, 32), (1, 64, 5120)),
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
        reference_latent=VIDEO,
        c_concat=(1, 20, 3, 32, 32),
    ),
    "WAN22_Animate": Entry(
        wan(in_dim=36),
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
    "Hunyuan3Dv2": Entry(
        dict(depth=2, depth_single_blocks=2, in_channels=64, context_in_dim=1536), (1, 64, 512), (1, 1370, 1536)
    ),
    "Hunyuan3Dv2mini": Entry(
        dict(depth_single_blocks=2, in_channels=64, context_in_dim=1536), (1, 64, 512), (1, 1370, 1536)
    ),
    "Hunyuan3Dv2_1": Entry(dict(depth=4, num_moe_layers=2), (1, 64, 512), (1, 1370, 1024)),
    "TripoSplat": Entry(dict(num_blocks=2), (1, 16, 8192), (1, 1370, 1280)),
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
    "HiDreamO1": Entry({}, (1, 3, 128, 128), None),
    "Chroma": Entry(
        dict(FLUX, out_dim=3072, hidden_dim=5120, n_layers=5, in_dim=64, in_channels=64),
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
        ),
        (1, 3, 128, 128),
        (1, 256, 4096),
        guidance=(1,),
    ),
    "SeedVR2": Entry(
        dict(vid_dim=2560, heads=20, num_layers=4, norm_eps=1e-5, mlp_type="swiglu", vid_out_norm=True, mm_layers=2),
        (1, 16, 3, 16, 16),
        (1, 58, 5120),
    ),
    "ACEStep": Entry(
        dict(num_layers=2),
        (1, 8, 16, 128),
        (1, 64, 768),
        attention_mask=(1, 64),
        speaker_embeds=(1, 512),
        lyric_token_idx=ids(1, 32),
        lyric_mask=(1, 32),
        lyrics_strength=1.0,
    ),
    "ACEStep15": Entry(dict(num_dit_layers=2, num_lyric_layers=2, num_timbre_layers=2), (1, 64, 128), (1, 64, 1024)),
    "MiniMaxMusic3": Entry({}, (1, 64, 128), (1, 64, 1024)),
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
    "Kandinsky5": Entry(dict(num_visual_blocks=2, model_dim=1792), VIDEO, (1, 64, 3584), y=(1, 768)),
    "Kandinsky5Image": Entry(dict(num_visual_blocks=2), (1, 16, 1, 32, 32), (1, 64, 3584), y=(1, 768)),
    "RT_DETR_v4": Entry({}, (1, 3, 640, 640), None),
    "ErnieImage": Entry(dict(num_layers=2), (1, 128, 32, 32), (1, 64, 3072)),
    "SAM3": Entry({}, (1, 3, 1008, 1008), None),
    "SAM31": Entry({}, (1, 3, 1008, 1008), None),
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
    "LTXAV": Entry(dict(num_layers=2), (1, 128, 3, 16, 16), (1, 128, 3840), attention_mask=(1, 128), frame_rate=25),
    "DepthAnything3": Entry({}, (1, 3, 504, 504), None),
}
