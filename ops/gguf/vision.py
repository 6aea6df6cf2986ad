"""The vision tower of Qwen 2.5-VL, which llama.cpp writes into a file of its own (mmproj) beside the encoder's."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..files.disk_map import check_files
from ..gather import memory_of
from .weight import GgufWeight, numbers_of

QUANTISATION = re.compile(r"[-_.]?(ud-)?(i?q\d(_[a-z0-9]+)*|bf16|f16|f32)$")
PROJECTIONS = re.compile(r"(visual\.blocks\.\d+\.attn)\.q\.(weight|bias)")
PATCHES = "visual.patch_embed.proj.weight"


def find_vision(path: Path) -> Path | None:
    """Find the vision tower of a text encoder: a GGUF file in the same folder with its name and 'mmproj' in it."""
    name = QUANTISATION.sub("", path.stem.lower())
    there = (other for other in sorted(path.parent.iterdir()) if other.suffix.lower() == ".gguf")
    return next((other for other in there if "mmproj" in other.name.lower() and name in other.name.lower()), None)


def as_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join what the model has in one weight: queries, keys and values, and the patches of two pictures."""
    for key in list(tensors):
        found = PROJECTIONS.fullmatch(key)
        if found is not None:
            names = [f"{found[1]}.{part}.{found[2]}" for part in "qkv"]
            if all(name in tensors for name in names):
                tensors[f"{found[1]}.qkv.{found[2]}"] = _rows([tensors.pop(name) for name in names])
    second = tensors.pop(f"{PATCHES}.1", None)
    if second is not None and PATCHES in tensors:
        check_files(part for one in (tensors[PATCHES], second) for part in memory_of(one))
        tensors[PATCHES] = torch.stack([numbers_of(tensors[PATCHES]), numbers_of(second)], 2)
    return tensors


def _rows(parts: list[torch.Tensor]) -> torch.Tensor:
    """Put weights below each other. Blocks of one type stay blocks."""
    check_files(memory for part in parts for memory in memory_of(part))
    forms = {part.form._replace(shape=part.form.shape[1:]) for part in parts if isinstance(part, GgufWeight)}
    if len(forms) == 1 and all(isinstance(part, GgufWeight) for part in parts):
        (form,) = forms
        shape = (sum(part.shape[0] for part in parts), *form.shape)
        blocks = torch.cat([part.blocks for part in parts])  # type: ignore[attr-defined]
        return GgufWeight(blocks, form._replace(shape=shape))
    return torch.cat([numbers_of(part) for part in parts])
