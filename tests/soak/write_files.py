"""Writes the model files of the soak: small ones of real architectures, with random weights."""

from pathlib import Path

from kit.comfyui.start import MISSING  # before torch is used

from .files import VARIANTS, variant_path

FLUX = {"hidden": 128, "depth": 1, "depth_single": 1, "context": 768, "pooled": 768}  # as wide as CLIP-L


def main(folder):
    assert not MISSING, MISSING
    import torch

    from kit.comfyui import checkpoints

    def lora(path, seed):
        checkpoints.lora(path, variant_path(folder, "diffusion_models/flux", 0), seed=seed)

    def embedding(path, seed):
        vectors = torch.randn(2, 768, generator=torch.Generator().manual_seed(seed)) * 0.1
        checkpoints.write(path, {"emb_params": vectors})

    writers = {
        "diffusion_models/flux": lambda path, seed: checkpoints.flux(path, seed=seed, **FLUX),
        "diffusion_models/second": lambda path, seed: checkpoints.flux(path, seed=10 + seed, **FLUX),
        # Large enough that a kill meets its save.
        "diffusion_models/large": lambda path, seed: checkpoints.flux(path, seed=seed, **{**FLUX, "hidden": 1024}),
        "checkpoints/sd15": lambda path, seed: checkpoints.sd15(path, seed=seed, mult=(1,)),
        "text_encoders/clip": lambda path, seed: checkpoints.clip_l(path, seed=seed),
        "vae/ae": lambda path, seed: checkpoints.flux_vae(path, seed=seed),
        "loras/detail": lora,
        "loras/light": lambda path, seed: lora(path, 10 + seed),
        "embeddings/style": embedding,
    }
    assert set(writers) == set(VARIANTS)
    for name, write in writers.items():
        for number in range(VARIANTS[name]):
            path = variant_path(folder, name, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, number)
            assert path.stat().st_size == Path(variant_path(folder, name, 0)).stat().st_size
