"""Run ComfyUI's real sampling, text encoding and VAE paths on small models."""

import comfy.model_management
import comfy.sample
import torch

# text width and pooled width of the files of checkpoints
WIDTHS = {
    "flux": (128, 64),
    "wan": (4096, None),
    "lumina2": (128, None),
    "z_image": (128, None),
    "qwen_image": (3584, None),
    "sd15": (768, None),
}
CFG = {"flux": 1.0, "wan": 3.0, "lumina2": 2.0, "z_image": 1.5, "qwen_image": 2.0, "sd15": 5.0}


def arch_of(model):
    config = model.model.model_config.unet_config
    kind = config.get("image_model")
    if kind == "lumina2":
        return "z_image" if config.get("z_image_modulation") else "lumina2"
    return {"flux": "flux", "wan2.1": "wan", "qwen_image": "qwen_image", None: "sd15"}[kind]


def widths(model):
    """(text width, pooled width or None), read from the model's configuration, never from its weights."""
    config = model.model.model_config.unet_config
    arch = arch_of(model)
    names = {
        "flux": ("context_in_dim", "vec_in_dim"),
        "lumina2": ("cap_feat_dim", None),
        "z_image": ("cap_feat_dim", None),
        "sd15": ("context_dim", None),
    }.get(arch)
    if names is None:
        return WIDTHS[arch]
    return config[names[0]], config[names[1]] if names[1] else None


def conds(arch, seed=7, tokens=None, guidance=3.5):
    """(positive, negative) for an architecture's name, or for a loaded model (then of its sizes)."""
    if isinstance(arch, str):
        width, pooled = WIDTHS[arch]
    else:
        (width, pooled), arch = widths(arch), arch_of(arch)
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(2):
        extra = {}
        if pooled:
            extra["pooled_output"] = torch.randn(1, pooled, generator=generator)
        if arch == "flux":
            extra["guidance"] = guidance
        count = tokens or (77 if arch == "sd15" else 8)
        out.append([[torch.randn(1, count, width, generator=generator), extra]])
    return tuple(out)


def empty_latent(model, width=64, height=64, frames=5, batch=1):
    latent_format = model.get_model_object("latent_format")
    shape = [batch, latent_format.latent_channels, height // 8, width // 8]
    if latent_format.latent_dimensions == 3:
        shape.insert(2, (frames - 1) // 4 + 1)
    return torch.zeros(shape, device=comfy.model_management.intermediate_device())


def sample(
    model,
    steps=4,
    seed=0,
    width=64,
    height=64,
    cfg=None,
    cond=None,
    *,
    frames=5,
    batch=1,
    sampler="euler",
    scheduler="normal",
    denoise=1.0,
    latent=None,
    callback=None,
):
    """Latents (fp32, CPU, a tensor of their own) of a run as the KSampler node makes it.

    ``cond``: a (positive, negative) pair; the default is conds(model).  ``callback(step, denoised, x, total)``.
    """
    positive, negative = conds(model) if cond is None else cond
    if latent is None:
        latent = empty_latent(model, width, height, frames, batch)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, seed)
        out = comfy.sample.sample(
            model,
            noise,
            steps,
            CFG[arch_of(model)] if cfg is None else cfg,
            sampler,
            scheduler,
            positive,
            negative,
            latent,
            denoise=denoise,
            callback=callback,
            disable_pbar=True,
            seed=seed,
        )
    return out.to("cpu", copy=True)


def text_encode(clip, text):
    """(cond, pooled or None), CPU tensors of their own, as the CLIPTextEncode node gets them."""
    with torch.inference_mode():
        cond, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return cond.to("cpu", copy=True), None if pooled is None else pooled.to("cpu", copy=True)


def vae_decode(vae, latent):
    """An image [B, H, W, 3] in 0..1."""
    with torch.inference_mode():
        return vae.decode(latent).to("cpu", copy=True)


def vae_encode(vae, image):
    with torch.inference_mode():
        return vae.encode(image[..., :3]).to("cpu", copy=True)


def image(width=64, height=64, seed=3, batch=1):
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def latent(channels, width=64, height=64, seed=4):
    return torch.randn(1, channels, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
