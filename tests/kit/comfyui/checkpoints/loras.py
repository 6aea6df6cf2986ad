"""LoRAs."""

import math

import torch

from .writing import read_header, write


def lora(path, base, rank=4, dtype=torch.float16, match="", limit=None, alpha=None, seed=0, drop=(), metadata=None):
    """A LoRA for the diffusion model in the file ``base``, for its matrices whose name contains ``match``."""
    entries = {}
    names = [
        name
        for name, entry in read_header(base).items()
        if len(entry["shape"]) == 2 and name.endswith(".weight") and match in name
    ]
    for name in names[:limit]:
        rows, columns = read_header(base)[name]["shape"]
        stem = "diffusion_model." + name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        entries[f"{stem}.lora_up.weight"] = ((rows, rank), dtype, 0.0, 0.3 / math.sqrt(rank))
        entries[f"{stem}.lora_down.weight"] = ((rank, columns), dtype, 0.0, 1.0 / math.sqrt(columns))
        entries[f"{stem}.alpha"] = torch.tensor(float(rank if alpha is None else alpha))
    return write(path, entries, seed, metadata, drop)
