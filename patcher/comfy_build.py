"""The one place where the host's loaders are told to build dynamic models.

The core decides dtypes, architectures and conversions; only what it makes of a patcher and how it opens a file are ours,
for this thread and the length of one load. Everything is put back afterwards.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch

from ..ops.disk_map import PICKLES, DiskMap, SourceError
from ..ops.saved_attributes import SavedAttributes
from ..ops.skip_init import skip_model_initialization
from .comfy_patcher import DynamicModelPatcher
from .policy import Policy

# Small parameters keep the values that the model's code gives them: files may lack them.
KEEP_BELOW = 64 << 10

log = logging.getLogger("spillway")
_lock = threading.RLock()


class Opened:
    """The files that one load opened: kept as long as the models whose weights lie in them."""

    def __init__(self) -> None:
        self.maps: list[DiskMap] = []

    @property
    def paths(self) -> str:
        """For messages."""
        return ", ".join(str(disk_map.path) for disk_map in self.maps) or "the file"


@contextmanager
def building(policy: Policy | None, *, initialise: bool = False) -> Iterator[Opened]:
    """Inside, the core's loaders make DynamicModelPatchers on memory maps, with parameters that take no memory.

    initialise: parameters get memory and the values that the model's code gives them, for files that lack some.
    """
    with _lock, nullcontext() if initialise else skip_model_initialization(KEEP_BELOW):
        opened = Opened()
        saved = SavedAttributes()
        thread = threading.get_ident()
        core_patcher = comfy.model_patcher.CoreModelPatcher
        core_load = comfy.utils.load_torch_file

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
            with_metadata = kwargs.get("return_metadata", args[2] if len(args) > 2 else False)
            return (tensors, disk_map.metadata) if with_metadata else tensors

        saved.set(comfy.model_patcher, "CoreModelPatcher", make_patcher)
        saved.set(comfy.utils, "load_torch_file", load_file)
        try:
            yield opened
        finally:
            saved.restore()


def refuse_pickle(path: str) -> None:
    """Raises SourceError, with the way to convert, for a file that cannot be mapped; before anything is built."""
    if path.lower().endswith(PICKLES):
        DiskMap(path)


def lacks_data(model: torch.nn.Module | None) -> bool:
    """Whether parameters have no memory after loading: the file lacks them, or the core copied into a classic model."""
    return model is not None and any(parameter.is_meta for parameter in model.parameters())


def build(load: Callable[[], Any], module_of: Callable[[Any], Any], policy: Policy | None) -> Any:
    """Run a loader of the core; again with real initial values where the file lacks some that the model's code sets.

    module_of: the module of what the loader made (None where it made none). Parts that the core never offloads (it makes
    a classic patcher for them) are loaded the core's own way.
    """
    with building(policy):
        made = load()
    if not lacks_data(module_of(made)):
        return made
    if not made.patcher.is_dynamic():
        log.info("[Spillway] %s is one that ComfyUI never offloads: it is loaded whole", type(module_of(made)).__name__)
        return load()
    with building(policy, initialise=True):
        return load()


def detected(make: Callable[[], Any], path: str) -> Any:
    """Run a loader of the core; its word for 'unknown architecture' becomes an error that names the file."""
    try:
        result = make()
    except SourceError:
        raise
    except RuntimeError as error:
        if "Could not detect model type" in str(error):
            raise SourceError(f"{path}: no model that ComfyUI knows was found in this file. {error}") from error
        raise
    if result is None:
        raise SourceError(f"{path}: no model that ComfyUI knows was found in this file.")
    return result
