"""Convolutional denoisers."""

from .table import Entry, ids

UNET = dict(image_size=32, out_channels=4, use_spatial_transformer=True, legacy=False)

SD = dict(
    **UNET,
    in_channels=4,
    num_res_blocks=[1, 1, 1, 1],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 0],
    transformer_depth_output=[1] * 6 + [0] * 2,
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


XL = xl([0, 1, 2], 2, [0, 0, 1, 1, 2, 2])

VIDEO_UNET = dict(
    UNET,
    num_res_blocks=[1, 1, 1, 1],
    channel_mult=[1, 2, 4, 4],
    num_head_channels=64,
    num_classes="sequential",
    transformer_depth=[1, 1, 1, 0],
    transformer_depth_output=[1] * 6 + [0] * 2,
    transformer_depth_middle=1,
    extra_ff_mix_layer=True,
    use_spatial_context=True,
    merge_strategy="learned_with_images",
    video_kernel_size=[3, 1, 1],
    use_temporal_resblock=True,
    disable_temporal_crossattention=False,
)

STEP = (1, 4, 64, 64)

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
            transformer_depth=[0, 1, 1, 1],
            transformer_depth_output=[1] * 6 + [0] * 2,
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
}
