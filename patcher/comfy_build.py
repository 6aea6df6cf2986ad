"""The one place where the host's loaders are told to build dynamic models.

The core decides dtypes, architectures and conversions; only what it makes of a patcher and how it opens a file are
ours, for this thread and the length of one load. Everything is put back afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch

from ..ops.copy_before_write import CopyBeforeWrite
from ..ops.disk_map import DiskMap, SourceError, locate
from ..ops.gather import inner_tensors
from ..ops.layer import is_out_of_memory
from ..ops.safetensors_header import PICKLES
from ..ops.saved_attributes import SavedAttributes
from ..ops.skip_init import skip_model_initialization
from .comfy_loaded import forget_unloaded
from .comfy_patcher import DynamicModelPatcher
from .policy import Policy

# Small parameters keep the values that the model's code gives them: files may lack them.
KEEP_BELOW = 64 << 10
# Text encoder files may lack what is computed but not used; the core leaves there whatever was in the memory.
UNUSED = ("text_projection.weight",)

_lock = threading.RLock()


class Opened:
    """What one load opened and found missing. The maps are kept as long as the models whose weights lie in them."""

    def __init__(self) -> None:
        self.maps: list[DiskMap] = []
        self._loaded: dict[tuple[int, str], torch.nn.Module] = {}

    def note(self, root: torch.nn.Module, missing: Sequence[str]) -> None:
        """After a state dict: weights of the core's layers that it lacks stand for nothing; using one is an error."""
        lacking = set(missing)
        for name, module in root.named_modules():
            for attr, parameter in module._parameters.items():
                key, full_name = (id(module), attr), f"{name}.{attr}" if name else attr
                if full_name not in lacking:
                    self._loaded[key] = module
                elif key not in self._loaded and parameter is not None and hasattr(module, "comfy_cast_weights"):
                    unused = full_name.endswith(UNUSED)
                    make = torch.zeros_like if unused else torch.empty_like
                    module._parameters[attr] = parameter_of(make(parameter, device="cpu" if unused else "meta"))

    def unused(self, model: torch.nn.Module) -> list[str]:
        """Paths of the files that gave the model nothing."""
        used = {
            found[0]
            for parameter in model.parameters()
            for part in inner_tensors(parameter.detach())
            if (found := locate(part)) is not None
        }
        return [str(disk_map.path) for disk_map in self.maps if disk_map not in used]

    @property
    def paths(self) -> str:
        """For messages."""
        return ", ".join(str(disk_map.path) for disk_map in self.maps) or "the file"


def parameter_of(data: torch.Tensor) -> torch.nn.Parameter:
    """A parameter that keeps its memory, also while others are made without."""
    return torch.Tensor._make_subclass(torch.nn.Parameter, data, False)  # type: ignore[attr-defined, no-any-return]


@contextmanager
def building(policy: Policy | None) -> Iterator[Opened]:
    """Inside, the core's loaders make DynamicModelPatchers on memory maps, with parameters that take no memory.

    Afterwards, parameters that the files lack are on the meta device.
    """
    forget_unloaded()  # a CLIP is loaded as soon as it is built
    with _lock, skip_model_initialization(KEEP_BELOW), ExitStack() as guards:
        opened, guard = Opened(), CopyBeforeWrite()
        saved = SavedAttributes()
        thread = threading.get_ident()
        core_patcher = comfy.model_patcher.CoreModelPatcher
        core_load = comfy.utils.load_torch_file
        load_state_dict: Callable[..., Any] = torch.nn.Module.load_state_dict

        def make_patcher(model: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return core_patcher(model, *args, **kwargs)
            patcher = DynamicModelPatcher(model, *args, **kwargs)
            patcher.policy = policy or Policy()
            model.spillway_maps = opened.maps
            model.spillway_path = opened.paths
            return patcher

        def load_file(path: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or str(path).lower().endswith(PICKLES):
                return core_load(path, *args, **kwargs)
            disk_map = DiskMap(path)
            opened.maps.append(disk_map)
            tensors = disk_map.state_dict()
            if disk_map.read_only:  # the core's conversions write into some tensors
                if not guard.watched:
                    guards.enter_context(guard)
                guard.watch(tensors.values())
            with_metadata = kwargs.get("return_metadata", args[2] if len(args) > 2 else False)
            return (tensors, disk_map.metadata) if with_metadata else tensors

        def load(module: torch.nn.Module, tensors: Any, strict: bool = True, assign: bool = False) -> Any:
            if threading.get_ident() == thread and not assign:
                # What is copied needs memory: small parts, and models that the core never offloads.
                for part in module.modules():
                    for attr, parameter in part._parameters.items():
                        if parameter is not None and parameter.is_meta:
                            part._parameters[attr] = parameter_of(torch.empty_like(parameter, device="cpu"))
            result = load_state_dict(module, tensors, strict, assign)
            if threading.get_ident() == thread and assign:
                opened.note(module, result.missing_keys)
            return result

        saved.set(comfy.model_patcher, "CoreModelPatcher", make_patcher)
        saved.set(comfy.utils, "load_torch_file", load_file)
        saved.set(torch.nn.Module, "load_state_dict", load)
        try:
            yield opened
        finally:
            saved.restore()


def refuse_pickle(path: str) -> None:
    """Raises SourceError, with the way to convert, for a file that cannot be mapped; before anything is built."""
    if path.lower().endswith(PICKLES):
        DiskMap(path)


def detected(make: Callable[[], Any], path: str) -> Any:
    """Run a loader of the core; its word for a file that it cannot use becomes an error that names the file."""
    try:
        result = make()
    except SourceError:
        raise
    except (KeyError, ValueError, RuntimeError) as error:
        words = str(error)
        if "Could not detect model type" in words:
            raise SourceError(f"{path}: no model that ComfyUI knows was found in this file. {words}") from error
        if is_out_of_memory(error):
            raise
        raise SourceError(
            f"{path}: ComfyUI could not read this file ({type(error).__name__}: {words}). It is damaged, of another "
            "architecture, or in a form that needs a newer ComfyUI."
        ) from error
    if result is None:
        raise SourceError(f"{path}: no model that ComfyUI knows was found in this file.")
    return result
