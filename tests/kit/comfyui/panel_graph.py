"""The graph that the tests of the panel run, with the ids that a page gives to its nodes."""

from kit.comfyui.running_server import node

FLUX = {"hidden": 256, "depth": 2, "depth_single": 4, "context": 768, "pooled": 768}  # as wide as CLIP-L


def graph(steps=4, seed=3):
    """A Flux with its text encoder and VAE, with the ids that a page gives."""
    return {
        "2": node("SpillwayLoadDiffusionModel", unet_name="flux.safetensors", weight_dtype="default"),
        "3": node("SpillwayLoadCLIP", clip_name1="clip.safetensors", type="stable_diffusion"),
        "4": node("SpillwayLoadVAE", vae_name="ae.safetensors"),
        "5": node("CLIPTextEncode", clip=["3", 0], text="a red house by the sea"),
        "6": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "7": node(
            "KSampler",
            model=["2", 0],
            positive=["5", 0],
            negative=["5", 0],
            latent_image=["6", 0],
            seed=seed,
            steps=steps,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "8": node("VAEDecode", samples=["7", 0], vae=["4", 0]),
        "9": node("SaveImage", images=["8", 0], filename_prefix="panel"),
    }
