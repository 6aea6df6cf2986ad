"""Folders as diffusers writes them: a model in a folder of its own, several of them in a pipeline's."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..files.safetensors_header import PICKLES, SourceError, is_pickle
from .index import NAME, index_of, part_of

PIPELINE = "model_index.json"
# What a loader takes out of a pipeline's folder.
MODEL, VAE, TEXT = ("transformer", "unet"), ("vae",), tuple(f"text_encoder{end}" for end in ("", "_2", "_3", "_4"))
STEMS = ("diffusion_pytorch_model", "model")
# As ComfyUI chooses. Others (of an average of the training, say) are chosen by hand.
VARIANTS = ("fp16", "bf16", "")
FILE = re.compile(r"^([^.]+)(?:\.([\w-]+))?\.safetensors$")


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds the models of a pipeline, each in a folder of its own."""
    folder = Path(path)
    return (folder / PIPELINE).is_file() or any((folder / name).is_dir() for name in (*MODEL, *VAE, *TEXT))


def may_be_model(path: str | os.PathLike[str]) -> bool:
    """Say whether a path is of a folder that may hold a model. One that is named as a file is a mistake."""
    return Path(path).suffix.lower() not in (".safetensors", ".sft", ".gguf", *PICKLES) and Path(path).is_dir()


def files_for(path: str | os.PathLike[str], names: tuple[str, ...]) -> list[Path]:
    """Return what a loader opens: the file itself, the one of a model's folder, or those of a pipeline's.

    names: of folders in a pipeline's, of which a loader of text encoders takes all and any other the first. Raises
    SourceError for a folder without such a model.
    """
    path = Path(path)
    if path.name == PIPELINE:
        path = path.parent
    if not may_be_model(path):
        return [path]
    found = _weights(path)
    if found is not None:
        return [found]
    folders = [path / name for name in names if (path / name).is_dir()]
    if not folders:
        raise SourceError(
            f"{path}: this folder has no weights, and no {' or '.join(names[:2])} folder with some. Choose the folder "
            "of a diffusers model, or a file."
        )
    return [weights_of(folder) for folder in (folders if names is TEXT else folders[:1])]


def weights_of(folder: Path) -> Path:
    """Return the file or index of a model's folder. Raises SourceError where there is none, or no telling which."""
    found = _weights(folder)
    if found is not None:
        return found
    pickles = sorted(name for name in os.listdir(folder) if is_pickle(name) and index_of(folder / name) is None)
    if pickles:
        raise SourceError(
            f"{folder}: only pickles here, such as '{pickles[0]}', which may run code. Convert it once, with the node "
            "Convert to Safetensors (Spillway), or get the safetensors files."
        )
    raise SourceError(f"{folder}: no safetensors file here. Download the model's weights into it.")


def _weights(folder: Path) -> Path | None:
    """Return the file or index of a model's folder; None where it has neither. Raises SourceError for several."""
    found: dict[tuple[int, int], str] = {}
    others = []
    for name in sorted(os.listdir(folder)):
        index, whole = NAME.search(name), FILE.match(name)
        if index is None and (whole is None or part_of(name) is not None):
            continue
        stem = name[: index.start()] if index is not None else str(whole and whole[1])
        variant = ((index[1] or "")[1:] if index is not None else whole and whole[2]) or ""
        if index is not None and "." in stem:  # model.fp16.safetensors.index.json
            stem, _, variant = stem.partition(".")
        if stem in STEMS and variant in VARIANTS:
            place = (STEMS.index(stem), VARIANTS.index(variant))
            if place not in found or index is None:  # one file rather than parts of the same
                found[place] = name
        else:
            others.append(name)
    if found:
        return folder / found[min(found)]
    if len(others) > 1:
        raise SourceError(
            f"{folder}: several models here: {', '.join(others[:5])}. Choose one of these files, not the folder."
        )
    return folder / others[0] if others else None
