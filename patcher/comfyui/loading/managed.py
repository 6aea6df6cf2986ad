"""Has every loader build Spillway models while it is turned on: ComfyUI's own, and those of other packs.

All of them come to a few functions of ComfyUI's, which make a model of a state dict. Those run as they are, and what
they make is dynamic (`loader_overrides`). Where that fails, they run once more without a change.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch

from ....ops.errors import SpillwayError
from ....ops.files.disk_map import DiskMap, SourceError, locate, map_of
from ....ops.overrides import is_overridden, override_everywhere
from ..patcher import DynamicModelPatcher
from .loader_overrides import building

log = logging.getLogger("spillway")


class Seam(NamedTuple):
    """A function of ComfyUI's that makes models.

    tensors: the argument with the state dict, or a list of them. '' where the function opens the file itself. assign:
    it would copy the weights before it makes a patcher. in_ram: it would build on the device with --highvram.
    """

    owner: str
    name: str
    what: str
    tensors: str = ""
    assign: bool = False
    in_ram: bool = False


SEAMS = (
    Seam("comfy.sd", "load_state_dict_guess_config", "checkpoint", "sd", in_ram=True),
    Seam("comfy.sd", "load_diffusion_model_state_dict", "diffusion model", "sd", in_ram=True),
    Seam("comfy.sd", "load_text_encoder_state_dicts", "text encoder", "state_dicts"),
    Seam("comfy.sd:VAE", "__init__", "VAE", "sd"),
    Seam("comfy.sd", "load_vae_patcher", "VAE"),
    Seam("comfy.clip_vision", "load_clipvision_from_sd", "image encoder", "sd", assign=True),
    Seam("comfy.controlnet", "load_controlnet_state_dict", "ControlNet", "state_dict", assign=True),
    Seam("comfy.audio_encoders.audio_encoders", "load_audio_encoder_from_sd", "audio encoder", "sd", assign=True),
    Seam("comfy_extras.nodes_upscale_model:UpscaleModelLoader", "execute", "upscale model", assign=True),
    Seam("comfy_extras.nodes_upscale_model:UpscaleModelLoader", "load_model", "upscale model", assign=True),
    Seam("comfy_extras.nodes_model_patch:ModelPatchLoader", "load_model_patch", "model patch", assign=True),
)
# The same function under the names by which loaders call it.
FILES = ("comfy.utils", "comfy.clip_vision")
# Of the files elsewhere, such as LoRAs, nothing is a model.
FOLDERS = (
    "checkpoints",
    "diffusion_models",
    "text_encoders",
    "vae",
    "clip_vision",
    "controlnet",
    "audio_encoders",
    "upscale_models",
    "model_patches",
)

SAFETENSORS = (".safetensors", ".sft")

_put_back: list[Callable[[], None]] = []
# Maps live as long as the models whose weights lie in them. These have none yet.
_opened: deque[DiskMap] = deque(maxlen=32)
_here = threading.local()


class NotManaged(SpillwayError, Exception):
    """Says why a model is left to ComfyUI, of which nothing need be said to the user."""


def is_on() -> bool:
    """Say whether every loader builds Spillway models now."""
    return bool(_put_back)


def turn_on() -> None:
    """Have every loader build Spillway models from now on. A second call does nothing."""
    if _put_back:
        return
    for owner in (owner for name in FILES for owner in owners(name)):
        if hasattr(owner, "load_torch_file"):
            _put_back.append(override_everywhere(owner, "load_torch_file", by=_open))
    for seam, owner in [(one, owner) for one in SEAMS for owner in owners(one.owner)]:
        if not hasattr(owner, seam.name):  # an older ComfyUI
            continue
        stands = inspect.getattr_static(owner, seam.name)
        signature = inspect.signature(stands.__func__ if isinstance(stands, classmethod) else stands)
        if seam.tensors and seam.tensors not in signature.parameters:
            log.warning(
                "[Spillway] manage every loader: another pack stands in %s.%s and does not say what it takes. Each %s "
                "is left to ComfyUI.",
                seam.owner,
                seam.name,
                seam.what,
            )
            continue
        _put_back.append(override_everywhere(owner, seam.name, by=_Building(seam, signature)))


def turn_off() -> None:
    """Put ComfyUI's functions back. What others have put around them stays, and calls ComfyUI's alone."""
    while _put_back:
        _put_back.pop()()
    forget()


def forget() -> None:
    """Close the files that were opened and that no model was made of. It is called when a prompt has ended."""
    _opened.clear()


def owners(name: str) -> list[Any]:
    """List what a seam names. ComfyUI loads its further nodes by their path, so such a class may be there twice."""
    module, _, attribute = name.partition(":")
    if module.startswith("comfy_extras."):
        known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
        found = [known.get(attribute), getattr(sys.modules.get(module), attribute, None)]
        return list(dict.fromkeys(owner for owner in found if owner is not None))
    owner = importlib.import_module(module)
    return [getattr(owner, attribute) if attribute else owner]


@contextmanager
def left_alone() -> Iterator[None]:
    """Inside, this thread's loaders build what they build without Spillway."""
    before, _here.left_alone = getattr(_here, "left_alone", False), True
    try:
        yield
    finally:
        _here.left_alone = before


def _leaves_alone() -> bool:
    return getattr(_here, "left_alone", False) or is_overridden(comfy.model_patcher, "CoreModelPatcher")


# -- files


def _open(load: Callable[..., Any], ckpt: Any, *args: Any, **kwargs: Any) -> Any:
    """Open a model's file as a map, whoever loads it. Each weight is then read when it is used."""
    named = dict(zip(("safe_load", "device", "return_metadata"), args, strict=False)) | kwargs
    device = named.get("device")
    on_cpu = device is None or torch.device(device).type == "cpu"
    if _leaves_alone() or not on_cpu or getattr(comfy.utils, "DISABLE_MMAP", False) or not _is_model(ckpt):
        return load(ckpt, *args, **kwargs)
    try:
        disk_map = DiskMap(ckpt)
    except (SourceError, OSError):  # ComfyUI's own way names what is wrong
        return load(ckpt, *args, **kwargs)
    # Other packs may write into the tensors, and ComfyUI reads numbers of 4 and 6 bits where it can.
    if disk_map.read_only or disk_map.left_out:
        return load(ckpt, *args, **kwargs)
    _opened.append(disk_map)
    tensors = disk_map.state_dict()
    return (tensors, dict(disk_map.metadata) or None) if named.get("return_metadata") else tensors


def _is_model(path: Any) -> bool:
    if not str(path).lower().endswith(SAFETENSORS):
        return False
    real = os.path.abspath(path)
    known = [name for name in FOLDERS if name in folder_paths.folder_names_and_paths]
    places = (place for name in known for place in folder_paths.get_folder_paths(name))
    return any(real.startswith(os.path.join(os.path.abspath(place), "")) for place in places)


# -- models


class _Building:
    """Stands in the place of one function of ComfyUI's."""

    def __init__(self, seam: Seam, signature: inspect.Signature) -> None:
        self.seam, self.signature = seam, signature

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if _leaves_alone():
            return call(*args, **kwargs)
        try:
            given = self.signature.bind(*args, **kwargs)
        except TypeError:
            return call(*args, **kwargs)  # whose error names what is wrong
        arguments = given.arguments
        if arguments.get("disable_dynamic"):
            with left_alone():
                return call(*args, **kwargs)
        if self._is_others(arguments):
            return call(*args, **kwargs)
        before = _versions(arguments.get(self.seam.tensors))
        try:
            return self._build(call, given)
        except comfy.model_management.InterruptProcessingException:
            raise
        except NotManaged as reason:
            log.debug("[Spillway] this %s is left to ComfyUI: %s", self.seam.what, reason)
        except Exception as error:  # whatever it is, ComfyUI may load the file
            log.warning(
                "[Spillway] manage every loader: this %s is left to ComfyUI (%s: %s)",
                self.seam.what,
                type(error).__name__,
                error,
            )
        if self.seam.name == "__init__":
            vars(args[0]).clear()
        _take_writes_back(self.signature.bind(*args, **kwargs).arguments.get(self.seam.tensors), before)
        with left_alone():
            return call(*args, **kwargs)

    def _is_others(self, arguments: dict[str, Any]) -> bool:
        """Say whether a pack has layers, or a class, of its own for the model, and so a way to manage it."""
        options = [arguments.get(name) or {} for name in ("model_options", "te_model_options")]
        if any(given.get("custom_operations") is not None for given in options):
            return True
        return self.seam.name == "__init__" and type(arguments["self"]) not in owners(self.seam.owner)

    def _build(self, call: Callable[..., Any], given: inspect.BoundArguments) -> Any:
        """Have ComfyUI make a dynamic model. Raises whatever speaks against one; the caller's tensors are untouched."""
        seam, arguments = self.seam, given.arguments
        dicts = _dicts(arguments[seam.tensors]) if seam.tensors in arguments else []
        copies = [dict(tensors) for tensors in dicts]  # ComfyUI takes out of a dict what it uses
        kept = [dict(tensors) for tensors in dicts]
        if seam.tensors in arguments:
            several = isinstance(arguments[seam.tensors], list | tuple)
            arguments[seam.tensors] = copies if several else copies[0]
        if seam.in_ram:
            own = {"offload_device": torch.device("cpu")}
            arguments["model_options"] = {**own, **(arguments.get("model_options") or {})}
        with building(DynamicModelPatcher, None, assign=seam.assign) as opened:
            for disk_map in _maps_of(copies):
                opened.use(disk_map)
                opened.sources.append(disk_map)
            made = call(*given.args, **given.kwargs)
        patchers = _checked(arguments["self"] if seam.name == "__init__" else made)
        for tensors, left in zip(dicts, copies, strict=True):
            for key in [key for key in tensors if key not in left]:
                del tensors[key]
        if dicts and "disable_dynamic" in self.signature.parameters and len(patchers) == 1:
            self._keep_way(patchers[0], given, kept)
        return made

    def _keep_way(self, patcher: Any, given: inspect.BoundArguments, kept: list[dict[str, Any]]) -> None:
        """Note how a classic model is made of the same tensors, which nodes ask for. Loaders of files say so later."""
        if patcher.cached_patcher_init is None:
            several = isinstance(given.arguments[self.seam.tensors], list | tuple)
            rest = {name: value for name, value in given.arguments.items() if name != self.seam.tensors}
            way = (self.seam, kept if several else kept[0], rest)
            patcher.cached_patcher_init = (_made_again, way)


def _made_again(seam: Seam, tensors: Any, rest: dict[str, Any], disable_dynamic: bool = False) -> Any:
    """Make a model of its tensors once more -> its patcher. disable_dynamic: ComfyUI's classic one."""
    given = [dict(one) for one in tensors] if isinstance(tensors, list) else dict(tensors)
    rest = {**rest, "disable_dynamic": disable_dynamic}
    (owner,) = owners(seam.owner)
    made = getattr(owner, seam.name)(**{seam.tensors: given}, **rest)
    return getattr(made, "patcher", made)


def _dicts(given: Any) -> list[dict[str, Any]]:
    dicts = list(given) if isinstance(given, list | tuple) else [given]
    if not all(isinstance(tensors, dict) for tensors in dicts):
        raise NotManaged("its tensors are in no dict")
    return dicts


def _versions(given: Any) -> dict[int, int]:
    """Say how often torch has written into each tensor."""
    tensors = [tensor for one in _some_dicts(given) for tensor in one.values() if isinstance(tensor, torch.Tensor)]
    return {id(tensor): tensor._version for tensor in tensors if not tensor.is_inference()}


def _take_writes_back(given: Any, before: dict[int, int]) -> None:
    """Read tensors of a file anew that were written into meanwhile. ComfyUI would convert them a second time."""
    for tensors in _some_dicts(given):
        for key, tensor in tensors.items():
            written = before.get(id(tensor)) == 0 and tensor._version > 0
            place = locate(tensor) if written else None
            if place is not None:
                with open(place[0].path, "rb") as file:
                    file.seek(place[1])
                    numbers = torch.frombuffer(bytearray(file.read(place[2])), dtype=tensor.dtype)
                tensors[key] = numbers.view(tensor.shape)


def _some_dicts(given: Any) -> list[dict[str, Any]]:
    return [one for one in (given if isinstance(given, list | tuple) else [given]) if isinstance(one, dict)]


def _maps_of(dicts: list[dict[str, Any]]) -> list[DiskMap]:
    tensors = (tensor for tensors in dicts for tensor in tensors.values() if isinstance(tensor, torch.Tensor))
    found = dict.fromkeys(map_of(tensor) for tensor in tensors)
    return [disk_map for disk_map in found if disk_map is not None]


def _checked(made: Any) -> list[DynamicModelPatcher]:
    """List the dynamic patchers of what a loader made. Raises for one that would fail when it runs."""
    ours = [patcher for patcher in _patchers(made) if isinstance(patcher, DynamicModelPatcher)]
    if not ours:
        raise NotManaged("ComfyUI makes no patcher for it, or a classic one on purpose")
    for patcher in ours:
        # What cannot be dynamic is refused here, not in the middle of a run.
        params = [param for bundle in patcher.dynamic.bundles for param in bundle.params]
        missing = [param.key for param in params if param.source.is_meta]
        if missing:
            raise SourceError(f"{len(missing)} weights are not in the file, such as {', '.join(missing[:3])}")
    return ours


def _patchers(made: Any) -> Iterator[Any]:
    parts = made if isinstance(made, list | tuple) else getattr(made, "args", None)
    if isinstance(made, comfy.model_patcher.ModelPatcher):
        yield made
    elif isinstance(parts, list | tuple):  # several, or what a node gives
        for part in parts:
            yield from _patchers(part)
    else:
        for name in ("patcher", "control_model_wrapped"):
            found = getattr(made, name, None)
            if isinstance(found, comfy.model_patcher.ModelPatcher):
                yield found
