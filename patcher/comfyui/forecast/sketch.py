"""Makes sketches of models: built by ComfyUI's loaders from the headers of their files, and never run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management
import torch

from ....ops.device.backend import backend_for
from ....ops.files.disk_map import DiskMap
from ....ops.files.safetensors_header import PICKLES
from ....ops.overrides import overridden
from ...dynamic_model import DynamicModel
from ...policy import Policy
from ..attach_patches import attach_patches, cast_in_ops
from ..first_use import orders_file, record_file
from ..flags import heed_flags
from ..kitchen import register_kitchen
from ..loading.checkpoint import load_checkpoint_guess_config
from ..loading.load import WEIGHT_DTYPES, load_diffusion_model
from ..model_state import memory_figures, model_dtype
from ..patcher import DynamicModelPatcher
from ..patches.int8_lora import FEWEST_MERGED
from ..patches.lora import Tensors, apply_lora, read_lora
from ..quantise.choose import AUTO, DEFAULT, most_exact, quantise_model
from ..quantise.int8 import INT8, INT8_AUTO
from ..quantise.layers import OwnInt8Layers

# Of a LoRA, ComfyUI looks at the numbers of such tensors: the shape that a weight gets.
SHAPES = "reshape_weight"


@dataclass(frozen=True)
class Loaded:
    """What a loader and the nodes behind it make.

    kind: the folder of the file, 'diffusion_models', 'checkpoints', 'text_encoders' or 'vae'. loras: (path, strength).
    leave_out: as in Quantise Model. more: paths of a text encoder's further files. family: of what model it is for.
    """

    path: str
    kind: str = "diffusion_models"
    weight_dtype: str = DEFAULT
    policy: Policy | None = None
    loras: tuple[tuple[str, float], ...] = ()
    leave_out: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    family: str = "stable_diffusion"


def sketch(wanted: Loaded) -> tuple[DynamicModelPatcher, list[str]]:
    """Make a sketch -> (patcher, what it could not know). Reads headers alone.

    Raises what the loaders raise, for a file that they would refuse.
    """
    unknown: list[str] = []
    with loading_nothing():
        return _sketched(wanted, unknown), unknown


@contextmanager
def loading_nothing() -> Iterator[None]:
    """Inside, what is built is not loaded. Checkpoints that fit go to the device at once, and so do text encoders."""
    with overridden(comfy.model_management, "load_models_gpu", by=_nothing):
        yield


def _nothing(*_: object, **__: object) -> None:
    """Load nothing."""


def _sketched(wanted: Loaded, unknown: list[str]) -> DynamicModelPatcher:
    # Formats of ComfyUI's own loader are formats of the load, the others are chosen afterwards.
    of_the_load = wanted.weight_dtype if WEIGHT_DTYPES.get(wanted.weight_dtype) else DEFAULT
    if wanted.kind == "checkpoints":
        patcher = load_checkpoint_guess_config(wanted.path, False, False, policy=wanted.policy)[0]
    else:
        patcher = load_diffusion_model(wanted.path, of_the_load, wanted.policy)
    if patcher is None:
        raise ValueError(f"{wanted.path}: there is no diffusion model in this file. Choose another.")
    if of_the_load == DEFAULT:
        quantise(patcher, wanted.weight_dtype, wanted.leave_out, unknown)
    for path, strength in wanted.loras:
        patcher = apply_lora(patcher, None, path, strength, 0.0, read=shapes_of_lora)[0]
    give_engine(patcher, unknown)
    return patcher  # type: ignore[no-any-return]


def quantise(patcher: DynamicModelPatcher, wanted: str, leave_out: Sequence[str], unknown: list[str]) -> None:
    """Have layers quantised as the loader does, but for what it measures."""
    if wanted == AUTO:
        wanted, _ = most_exact(patcher, leave_out)
    if wanted == INT8_AUTO:
        unknown.append("int8_auto")
        wanted = INT8
    if wanted == INT8:
        register_kitchen()
        name = type(patcher.model.diffusion_model).__name__
        patcher.state.quantise = OwnInt8Layers(name, patcher.load_device.type, "diffusion_model.", leave_out)
    elif wanted != DEFAULT:
        quantise_model(patcher, wanted, leave_out)


def shapes_of_lora(path: str) -> tuple[Tensors, dict[str, str]]:
    """Give tensors without numbers, of the shapes in a LoRA's header."""
    if path.lower().endswith(PICKLES):
        return read_lora(path)  # it has no header
    found = {}
    for key, tensor in DiskMap(path).state_dict().items():
        if key.endswith(SHAPES):
            found[key] = tensor
        elif tensor.numel() == 1:  # a scale, which changes no size
            found[key] = torch.ones(tensor.shape, dtype=torch.float32)
        else:
            found[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return found, {}


def give_engine(patcher: DynamicModelPatcher, unknown: list[str]) -> None:
    """Give the patcher an engine that is only asked, set up as for a load."""
    state = patcher.state
    state.dynamic = DynamicModel(
        patcher.model,
        None,
        patcher.load_device,
        patcher.policy,
        name=type(patcher.model).__name__,
        model_dtype=model_dtype,
        quantise=state.quantise,
        backend=heed_flags(backend_for(patcher.load_device, memory_figures)),
        may_init=False,
        first_use_file=record_file(),
        orders_file=orders_file(),
        sketch=True,
    )
    cast_in_ops(patcher, state, state.dynamic)
    int8_lora = patcher.policy.int8_lora
    params = [param for bundle in state.dynamic.bundles for param in bundle.params]
    bits = {param.quantisation.bits for param in params if param.quantisation is not None}
    if patcher.patches and int8_lora == "auto" and bits and min(bits) >= FEWEST_MERGED:
        # A load looks at numbers, and keeps a LoRA beside the weights where merging rounds them worse.
        unknown.append("int8_lora")
        int8_lora = "merge"
    attach_patches(patcher, state, state.dynamic, {}, had_hooks=False, int8_lora=int8_lora)
