"""Loads checkpoints by the contract of ComfyUI's own functions, with dynamic models.

Arguments, results, log and errors are those of `comfy.sd`, as ComfyUI's function does the work.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import comfy.sd
import torch

from ....ops.files.disk_map import DiskMap, map_of
from ....ops.files.disk_maps import DiskMaps
from ...policy import Policy
from ..patcher import DynamicModelPatcher
from .load_again import keep_dynamic
from .loader_overrides import building, opening_indexes, refuse_pickle

Parts = tuple[Any, Any, Any, Any]


def load_checkpoint_guess_config(
    path: str,
    output_vae: bool = True,
    output_clip: bool = True,
    output_clipvision: bool = False,
    embedding_directory: Any = None,
    output_model: bool = True,
    model_options: dict[str, Any] | None = None,
    te_model_options: dict[str, Any] | None = None,
    disable_dynamic: bool = False,
    *,
    policy: Policy | None = None,
) -> Parts:
    """Load a checkpoint -> (MODEL, CLIP, VAE, CLIP_VISION), with None for what was not asked for or is not there.

    A VAE that was asked for and is not there is an object that raises when it is used. Missing keys are logged. They
    raise SourceError when the model is used. disable_dynamic: give ComfyUI's classic patchers instead. Raises
    RuntimeError for a file whose model ComfyUI does not know.
    """
    refuse_pickle(path)
    options = _options(model_options, disable_dynamic)
    asked = path, output_vae, output_clip, output_clipvision, embedding_directory, output_model, options
    text = te_model_options or {}
    if disable_dynamic:
        with opening_indexes():
            return comfy.sd.load_checkpoint_guess_config(*asked, text, disable_dynamic=True)  # type: ignore[no-any-return]
    with building(DynamicModelPatcher, policy):
        return _kept_dynamic(comfy.sd.load_checkpoint_guess_config(*asked, text), policy)


def load_state_dict_guess_config(
    sd: MutableMapping[str, torch.Tensor] | DiskMap | DiskMaps,
    output_vae: bool = True,
    output_clip: bool = True,
    output_clipvision: bool = False,
    embedding_directory: Any = None,
    output_model: bool = True,
    model_options: dict[str, Any] | None = None,
    te_model_options: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    disable_dynamic: bool = False,
    *,
    policy: Policy | None = None,
) -> Parts | None:
    """Load a checkpoint from tensors by key, or from open maps. Returns None where ComfyUI does not know the model.

    As in ComfyUI, a state dict loses the keys that are used. The tensors are used as they are, not copied. Those of a
    map are read when they are used.
    """
    maps = [sd] if isinstance(sd, DiskMap) else sd.maps if isinstance(sd, DiskMaps) else []
    if isinstance(sd, DiskMap) and metadata is None:
        metadata = sd.metadata
    tensors: Any = {key: tensor for disk_map in maps for key, tensor in disk_map.state_dict().items()} if maps else sd
    options = _options(model_options, disable_dynamic)
    asked = tensors, output_vae, output_clip, output_clipvision, embedding_directory, output_model, options
    named = {"te_model_options": te_model_options or {}, "metadata": metadata}
    if disable_dynamic:
        return comfy.sd.load_state_dict_guess_config(*asked, **named, disable_dynamic=True)  # type: ignore[no-any-return]
    with building(DynamicModelPatcher, policy) as opened:
        for disk_map in maps or _maps_of(tensors):
            opened.use(disk_map)
            opened.watch(disk_map, tensors)
        parts = comfy.sd.load_state_dict_guess_config(*asked, **named)
        return None if parts is None else _kept_dynamic(parts, policy)


def _maps_of(tensors: Any) -> list[DiskMap]:
    """List the maps that tensors of a state dict lie in, as where a node has taken them from a map."""
    maps = [map_of(tensor) for tensor in tensors.values() if isinstance(tensor, torch.Tensor)]
    return list(dict.fromkeys(disk_map for disk_map in maps if disk_map is not None))


def _options(given: dict[str, Any] | None, disable_dynamic: bool) -> dict[str, Any]:
    """Keep dynamic models' weights in host memory until they are used, whatever --highvram says."""
    return dict(given or {}) if disable_dynamic else {"offload_device": torch.device("cpu"), **(given or {})}


def _kept_dynamic(parts: Parts, policy: Policy | None) -> Parts:
    model, clip, vae, _ = parts
    for patcher in (model, getattr(clip, "patcher", None), getattr(vae, "patcher", None)):
        keep_dynamic(patcher, policy)
    return parts
