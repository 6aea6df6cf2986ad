"""Make ComfyUI's detection know small files of two kinds."""

import functools


def accept_small_lumina():
    """Let ComfyUI's detection recognise Lumina 2, Z-Image and Qwen-Image files of other widths than the published.

    ComfyUI keeps the number of heads of the first two by width and would build every other width wrongly (it fails an
    assertion), so nothing that works without this works differently with it.  A small Z-Image becomes ComfyUI's
    `Lumina2` model with a Z-Image's options: its timestep shift is 6 instead of 3, the network is the same.
    """
    import comfy.model_detection as detection

    plain = detection.detect_unet_config
    if getattr(plain, "accepts_small_lumina", False):
        return

    @functools.wraps(plain)
    def detect_unet_config(state_dict, key_prefix, *args, **kwargs):
        config = plain(state_dict, key_prefix, *args, **kwargs)
        if config is not None and config.get("image_model") == "qwen_image":  # of 3072 in all published files
            config["num_attention_heads"] = state_dict[f"{key_prefix}img_in.weight"].shape[0] // 128
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
