"""Reads LoRA files, matches them to a model and a text encoder, and says what did not fit."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.utils
import torch

from ....ops.errors import SpillwayError
from ....ops.files.coming_file import wait_whole
from ....ops.files.disk_map import SourceError
from ....ops.files.read_whole import read_whole
from ....ops.files.safetensors_header import PICKLES
from ....ops.ram.available import available_ram
from .lora_shapes import misshapen
from .weight_patch import tensors_of

Tensors = dict[str, torch.Tensor]

# Beginnings of a text encoder's keys in the files of all trainers.
TEXT_ENCODER = ("lora_te", "lora_prior_te", "text_encoder", "text_model", "te1", "te2", "te3", "clip_", "cond_stage")
# This many files are kept, as many as a usual graph has, while they take no more than a part of the available RAM. One
# that a model still uses takes no memory of its own.
FILES, SHARE = 8, 16


# By path, size, inode, and the times of the content and of the last change, of which the first can be set to what it
# was before. The least recently used first.
_kept: OrderedDict[tuple[str, int, int, int, int], tuple[Tensors, dict[str, str]]] = OrderedDict()


class NoFit(SpillwayError, ValueError):
    """Says that nothing of a LoRA belongs to the models that it is given."""


@dataclass(frozen=True)
class Fit:
    """Counts the tensors of a file that a model and a text encoder take. misfits: names of the others.

    misshapen: names, and both shapes, of tensors that belong to a weight of another shape.
    """

    used: int
    misfits: tuple[str, ...]
    misshapen: tuple[str, ...] = ()
    # Tensors left over because there is no text encoder to take them.
    for_clip: int = 0

    @property
    def total(self) -> int:
        return self.used + len(self.misfits) + len(self.misshapen) + self.for_clip

    def in_words(self, name: str) -> str:
        """Word a warning. Empty where everything fits that could."""
        if not self.misfits and not self.misshapen:
            return ""
        words = [f"{name}: {self.used} of {self.total} tensors fit."]
        if self.misfits:
            words.append(f"{len(self.misfits)} do not, such as {', '.join(self.misfits[:3])}.")
        if self.misshapen:
            words.append(f"{len(self.misshapen)} have another shape: {'; '.join(self.misshapen[:3])}.")
        return " ".join([*words, "The LoRA may be made for another version of this model."])


def read_lora(path: str) -> tuple[Tensors, dict[str, str]]:
    """Read the tensors and the metadata of a LoRA file. Gives the same objects again while the file is unchanged.

    The tensors lie in memory, so what happens to the file afterwards reaches no model. Raises SourceError for a file
    that cannot be read.
    """
    wait_whole(path)
    status = os.stat(path)
    key = path, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
    if key not in _kept:
        _kept[key] = _read(path)
    _kept.move_to_end(key)
    while len(_kept) > 1 and (len(_kept) > FILES or SHARE * sum(key[1] for key in _kept) > available_ram().available):
        _kept.popitem(last=False)
    return _kept[key]


def _read(path: str) -> tuple[Tensors, dict[str, str]]:
    try:
        if path.lower().endswith(PICKLES):
            tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        else:
            tensors, metadata = read_whole(path)
    except Exception as error:
        raise SourceError(
            f"{path}: this LoRA file cannot be read ({type(error).__name__}: {error}). It is damaged, or no LoRA. "
            "Download it again."
        ) from error
    tensors = {key: value for key, value in tensors.items() if torch.is_tensor(value)}
    if not tensors:
        raise SourceError(f"{path}: there are no tensors in this file. It is damaged, or no LoRA. Download it again.")
    return tensors, metadata or {}


def apply_lora(
    model: Any,
    clip: Any,
    path: str,
    strength_model: float = 1.0,
    strength_clip: float = 1.0,
    read: Callable[[str], tuple[Tensors, dict[str, str]]] | None = None,
) -> tuple[Any, Any, Fit | None]:
    """Clone MODEL and CLIP, of any loader, and put the LoRA on the clones. Either may be None.

    A side whose strength is 0 comes back as it is. Where both are 0, the file is not read and there is no Fit. Weights
    of another shape than the LoRA's stay as they are. read: in the place of `read_lora`.
    Raises NoFit, with names from both sides, where nothing fits; SourceError for a file that cannot be read.
    """
    if (model is None or strength_model == 0) and (clip is None or strength_clip == 0):
        return model, clip, None
    tensors, metadata = (read or read_lora)(path)
    tensors = comfy.lora_convert.convert_lora(tensors)
    sides = [side for side in (model, None if clip is None else clip.patcher) if side is not None]
    names: dict[str, Any] = {}
    if model is not None:
        names = comfy.lora.model_lora_keys_unet(model.model, names)
    if clip is not None:
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    known = {key for side in sides for key in side.model.state_dict()}
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    patches = {key: patch for key, patch in patches.items() if _weight_of(key) in known}
    wrong: dict[Any, tuple[int, ...]] = {}
    for side in sides:
        theirs = set(side.model.state_dict())
        wrong |= misshapen(side.model, {key: patch for key, patch in patches.items() if _weight_of(key) in theirs})
    fit = _fit(tensors, patches, wrong, has_clip=clip is not None)
    patches = {key: patch for key, patch in patches.items() if key not in wrong}
    if not fit.used:
        raise NoFit(_no_fit(path, tensors, sides, fit, has_clip=clip is not None))
    if model is not None and strength_model != 0:
        model = model.clone()
        model.add_patches(patches, strength_model)
        if metadata:
            model.set_attachments("lora_metadata", metadata)  # where ComfyUI's loader keeps it
    if clip is not None and strength_clip != 0:
        clip = clip.clone()
        clip.add_patches(patches, strength_clip)
        if metadata:
            clip.patcher.set_attachments("lora_metadata", metadata)
    return model, clip, fit


def _weight_of(key: Any) -> str:
    """Return the name of the weight that a patch is for; its key may name a part of the weight too."""
    return key if isinstance(key, str) else key[0]


def _fit(tensors: Tensors, patches: dict[Any, Any], wrong: dict[Any, tuple[int, ...]], has_clip: bool) -> Fit:
    """Count by the tensors themselves, as ComfyUI tells only its log which keys it did not know.

    wrong: the patches that have another shape than their weight, with the weight's.
    """
    used = {id(tensor) for patch in patches.values() for tensor in tensors_of(patch)}
    # Single numbers (alpha) and shapes belong to a weight that is counted. In its patch they are no tensors any more.
    counted = [key for key, tensor in tensors.items() if tensor.numel() > 1 and not key.endswith("reshape_weight")]
    rest = [key for key in counted if id(tensors[key]) not in used]
    for_clip = [key for key in rest if not has_clip and key.startswith(TEXT_ENCODER)]
    misfits = tuple(sorted(set(rest) - set(for_clip)))
    shapes = {id(tensor): (key, wrong[key]) for key in wrong for tensor in tensors_of(patches[key])}
    misshapen = tuple(
        f"{key} {list(tensors[key].shape)} for {_weight_of(shapes[id(tensors[key])][0])} "
        f"{list(shapes[id(tensors[key])][1])}"
        for key in counted
        if id(tensors[key]) in shapes
    )
    return Fit(len(counted) - len(rest) - len(misshapen), misfits, misshapen, len(for_clip))


def _no_fit(path: str, tensors: Tensors, sides: list[Any], fit: Fit, has_clip: bool) -> str:
    theirs = sorted(tensors)
    if fit.misshapen:
        return (
            f"{path}: no tensor of this LoRA fits. Its names do, but not their shapes: {'; '.join(fit.misshapen[:3])}. "
            "It was made for a model of another size: choose one made for this model."
        )
    if not has_clip and all(key.startswith(TEXT_ENCODER) for key in theirs):
        remedy = "It is for a text encoder only: connect the CLIP."
    else:
        remedy = "It was made for another kind of model, or is no LoRA: choose one made for this model."
    ours = [f"{type(side.model).__name__} has {_some(_matrices(side.model))}" for side in sides]
    return f"{path}: no tensor of this LoRA fits. It has {_some(theirs)}; {'; '.join(ours)}. {remedy}"


def _matrices(model: torch.nn.Module) -> list[str]:
    """List the weights that LoRAs are for, or all where a model has none of them."""
    matrices = [key for key, tensor in model.state_dict().items() if tensor.dim() > 1]
    return matrices or list(model.state_dict())


def _some(keys: list[str]) -> str:
    """Name the first key, the one in the middle and the last."""
    if len(keys) <= 3:
        return ", ".join(keys)
    return f"{keys[0]}, {keys[len(keys) // 2]}, {keys[-1]} and {len(keys) - 3} more"
