"""Sound, shapes, and what is found in pictures."""

import torch

from .fake_card import CARD
from .table import COMPUTES_IN, Entry, ids, packed, tensor

SPLAT = [(1, 8192, 16), (1, 1, 5)]


def segment(model, x):
    """Find by text, then by a point, as ComfyUI's nodes do."""
    x = x.to(COMPUTES_IN)
    sam = model.diffusion_model
    sam(x, text_embeddings=tensor(1, 32, 1024, dtype=COMPUTES_IN), text_mask=tensor(1, 32) > 0)
    labels = torch.ones(1, 2, dtype=torch.int32, device=CARD)
    points = {"point_coords": tensor(1, 2, 2, dtype=COMPUTES_IN), "point_labels": labels}
    return sam.forward_segment(x, point_inputs=points)


# Eight blocks of its encoder of pictures have one with attention over the whole picture.
SAM = {
    "diffusion_model.detector.backbone.vision_backbone.trunk.blocks": 8,
    "diffusion_model.detector.transformer.encoder.layers": 1,
    "diffusion_model.detector.transformer.decoder.layers": 1,
}
DETR = {
    "diffusion_model.backbone.stages.2.blocks": 2,
    **{
        f"diffusion_model.encoder.{way}_blocks.{block}.cv{part}.0.bottlenecks": 1
        for way in ("fpn", "pan")
        for block in (0, 1)
        for part in (2, 3)
    },
}

MODELS = {
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
    "Hunyuan3Dv2": Entry(
        dict(depth=2, depth_single_blocks=2, in_channels=64, context_in_dim=1536), (1, 64, 512), (1, 1370, 1536)
    ),
    "Hunyuan3Dv2mini": Entry(
        dict(depth_single_blocks=2, in_channels=64, context_in_dim=1536), (1, 64, 512), (1, 1370, 1536)
    ),
    "Hunyuan3Dv2_1": Entry(dict(depth=4, num_moe_layers=0), (1, 64, 512), (1, 1370, 1024)),
    "TripoSplat": Entry(
        dict(num_blocks=2),
        packed(SPLAT),
        (1, 1370, 1280),
        latent_shapes=SPLAT,
        ref_latents=lambda: [tensor(1, 128, 32, 32)],
    ),
    "Trellis2": Entry(dict(resolution=64, num_blocks=2), (1, 32, 16, 16, 16), (1, 1029, 1024), embeds=(1, 1029, 1024)),
    "ACEStep": Entry(
        dict(num_layers=2),
        (1, 8, 16, 128),
        (1, 64, 768),
        speaker_embeds=(1, 512),
        lyric_token_idx=ids(1, 32),
        lyrics_strength=1.0,
    ),
    "ACEStep15": Entry(
        dict(num_dit_layers=2, num_lyric_layers=2, num_timbre_layers=2),
        (1, 64, 128),
        (1, 64, 1024),
        lyric_embed=(1, 64, 1024),
        refer_audio=(1, 64, 750),
        is_covers=False,
        built_on="cpu",
    ),
    "MiniMaxMusic3": Entry({}, (1, 128, 64), (1, 32, 8 * 4096), conditioning_scale=(1, 1, 1)),
    "RT_DETR_v4": Entry({}, (1, 3, 640, 640), call=lambda model, x: model.diffusion_model(x), short=DETR),
    "SAM3": Entry({}, (1, 3, 1008, 1008), call=segment, short=SAM),
    "SAM31": Entry({}, (1, 3, 1008, 1008), call=segment, short=SAM),
    "DepthAnything3": Entry({}, (1, 3, 504, 504), call=lambda model, x: model.diffusion_model(x.to(COMPUTES_IN))),
}
