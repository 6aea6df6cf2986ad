"""Loads what stands beside a diffusion model: CLIP vision, ControlNets, audio encoders, style and upscale models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch

from ....ops.files.disk_map import SourceError
from ...dynamic_model import DynamicModel
from ...policy import Policy
from ..model_state import model_dtype
from ..patcher import DynamicModelPatcher
from .loader_overrides import building, detected, refuse_pickle

# OpenAI's own names of a vision tower, in a CLIP that has both towers.
OPENAI = "visual.transformer.resblocks.0.attn.in_proj_weight"


def _load(path: str, policy: Policy | None, load: Callable[[], Any], what: str) -> Any:
    """Run a loader of ComfyUI's. Raises SourceError, with what was looked for, where the file holds none."""
    refuse_pickle(path)
    with building(DynamicModelPatcher, policy, assign=True):
        try:
            return detected(load, path)
        except SourceError:
            raise
        except Exception as error:
            # Some loaders raise classes of their own, or Exception itself.
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise
            raise SourceError(
                f"{path}: no {what} that ComfyUI knows was found in this file ({type(error).__name__}: {error})."
            ) from error


def load_clip_vision(path: str, policy: Policy | None = None) -> Any:
    """Load an image encoder (CLIP vision, SigLIP, DINO) -> CLIP_VISION. Raises SourceError for a file of none."""
    import comfy.clip_vision

    def load() -> Any:
        tensors = comfy.utils.load_torch_file(path)
        openai = OPENAI in tensors
        return comfy.clip_vision.load_clipvision_from_sd(tensors, "visual." if openai else "", openai)

    return _load(path, policy, load, "image encoder")


def load_controlnet(path: str, policy: Policy | None = None, model: Any = None) -> Any:
    """Load a ControlNet, Control-LoRA or T2I adapter -> CONTROL_NET. Raises SourceError for a file of none.

    model: the MODEL that a file with differences is added to.
    """
    return _load(path, policy, lambda: comfy.controlnet.load_controlnet(path, model), "ControlNet")


def load_audio_encoder(path: str, policy: Policy | None = None) -> Any:
    """Load an audio encoder (wav2vec 2, Whisper) -> AUDIO_ENCODER. Raises SourceError for a file of none."""
    from comfy.audio_encoders.audio_encoders import load_audio_encoder_from_sd

    return _load(path, policy, lambda: load_audio_encoder_from_sd(comfy.utils.load_torch_file(path)), "audio encoder")


def load_style_model(path: str, policy: Policy | None = None) -> Any:
    """Load a style model (Redux, T2I style adapter) -> STYLE_MODEL. Raises SourceError for a file of none.

    ComfyUI runs it on the CPU, without a patcher.
    """

    def load() -> Any:
        style = comfy.sd.load_style_model(path)
        name = type(style.model).__name__
        style.model = DynamicModel(style.model.eval(), None, "cpu", policy, name=name, model_dtype=model_dtype)
        return style

    return _load(path, policy, load, "style model")


def load_upscale_model(path: str, policy: Policy | None = None) -> Any:
    """Load an upscale model of spandrel's architectures -> UPSCALE_MODEL. Raises SourceError for a file of none."""
    from comfy_extras import nodes_upscale_model  # adds the architectures of spandrel_extra_arches
    from spandrel import ImageModelDescriptor

    def load() -> Any:
        tensors = comfy.utils.load_torch_file(path)
        if "module.layers.0.residual_group.blocks.0.norm1.weight" in tensors:
            tensors = comfy.utils.state_dict_prefix_replace(tensors, {"module.": ""})
        # Spandrel reads shapes and drops keys from the dict that it is given.
        upscale = nodes_upscale_model.ModelLoader().load_from_state_dict(dict(tensors)).eval()
        if not isinstance(upscale, ImageModelDescriptor):
            raise SourceError(f"{path}: {type(upscale.model).__name__} is no model that makes one image of one image.")
        devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
        upscale.patcher = comfy.model_patcher.CoreModelPatcher(upscale.model, *devices)  # a dynamic one, here
        return upscale

    upscale = _load(path, policy, load, "upscale model")
    # Older versions of ComfyUI and other packs move the model by hand.
    upscale.to = lambda *args, **_: _moved(upscale, *args)
    return upscale


def _moved(upscale: Any, *places: Any) -> Any:
    """Load the model where it is moved to its device. Moved away, its weights give way when memory is needed."""
    wanted = [torch.device(place).type for place in places if isinstance(place, str | torch.device)]
    if wanted == [upscale.patcher.load_device.type]:
        comfy.model_management.load_models_gpu([upscale.patcher])
    return upscale


def load_model_patch(name: str, policy: Policy | None = None) -> Any:
    """Load a file of models/model_patches, through ComfyUI's own node -> MODEL_PATCH.

    Raises SourceError for a file of none.
    """
    import folder_paths
    from comfy_extras.nodes_model_patch import ModelPatchLoader

    path = folder_paths.get_full_path_or_raise("model_patches", name)
    return _load(path, policy, lambda: ModelPatchLoader().load_model_patch(name)[0], "model patch")
