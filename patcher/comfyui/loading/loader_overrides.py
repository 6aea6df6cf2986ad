"""Has ComfyUI's loaders build dynamic models, for this thread and the length of one load.

ComfyUI decides dtypes, architectures and conversions. Which patcher it makes and how it opens a file are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.model_patcher
import comfy.utils
import torch

from ....ops.device.out_of_memory import is_out_of_memory
from ....ops.files.check_before_read import CheckBeforeRead
from ....ops.files.coming_file import wait_whole
from ....ops.files.copy_before_write import CopyBeforeWrite
from ....ops.files.disk_map import DiskMap, SourceError, locate
from ....ops.files.safetensors_header import PICKLES, is_pickle
from ....ops.gather import memory_of
from ....ops.lending.idle_weight import as_stored
from ....ops.overrides import overridden
from ....ops.parts.index import is_index
from ....ops.parts.open_map import open_map
from ....ops.parts.sharded_map import ShardedMap
from ....ops.skip_init import skip_model_initialization
from ...policy import Policy
from ..running import drop_unloaded
from .check_quantised import check_quantised
from .diffusers_names import convert_lazily
from .lazy_layers import check_shapes
from .quantised_ops import cast_when_used

log = logging.getLogger("spillway")

# Parameters below this size keep the values that the model's code gives them, as files may lack them.
KEEP_BELOW = 64 << 10
# ComfyUI moves T2I adapters by hand, and nothing would check their file before they are read.
ADAPTERS = "comfy.t2i_adapter.", "comfy.ldm.cascade.controlnet"
# Text encoder files may lack weights whose products nobody uses. ComfyUI leaves there whatever was in the memory.
UNUSED = ("text_projection.weight",)
# By the rows of a table, how many tokens there are. llama.cpp leaves out rows of Gemma 3's that no token has.
TOKENS_OF_TABLES = {262208: 262144}


class Opened:
    """Notes what one load opened and found missing. The maps live as long as the models whose weights lie in them."""

    def __init__(self, guards: ExitStack) -> None:
        self.maps: list[DiskMap] = []
        self.sources: list[DiskMap | ShardedMap] = []
        self._guards, self._guard = guards, CopyBeforeWrite()
        self._loaded: dict[tuple[int, str], torch.nn.Module] = {}

    def use(self, disk_map: DiskMap | ShardedMap) -> None:
        """Check a map from here on, whenever torch reads."""
        self.maps += disk_map.files

    def watch(self, disk_map: DiskMap | ShardedMap, tensors: Mapping[str, Any]) -> None:
        """Copy tensors in a read-only map before ComfyUI's conversions write into them."""
        if disk_map.read_only:
            if not self._guard.watched:
                self._guards.enter_context(self._guard)
            self._guard.watch(tensors.values())

    def note(self, root: torch.nn.Module, missing: Sequence[str]) -> None:
        """Record what a state dict lacked.

        Missing weights of ComfyUI's layers go to the meta device, so using one raises.
        """
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
        """List the files that gave the model nothing."""
        used = {
            place[0]
            # A state dict has the source of a weight that stands idle.
            for tensor in model.state_dict().values()
            if isinstance(tensor, torch.Tensor)
            for part in memory_of(as_stored(tensor))
            if (place := locate(part)) is not None
        }
        return [str(source.path) for source in self.sources if not used & set(source.files)]

    @property
    def paths(self) -> str:
        """Name the files, for messages."""
        return ", ".join(str(source.path) for source in self.sources) or "the file"


def parameter_of(data: torch.Tensor) -> torch.nn.Parameter:
    """Make a parameter that keeps its memory, also while others are made without."""
    return torch.Tensor._make_subclass(torch.nn.Parameter, data, False)  # type: ignore[attr-defined, no-any-return]


@contextmanager
def building(
    dynamic_patcher: Callable[..., Any],
    policy: Policy | None,
    ready: Iterable[DiskMap | ShardedMap] = (),
    *,
    assign: bool = False,
) -> Iterator[Opened]:
    """Inside, ComfyUI's loaders make patchers with `dynamic_patcher`, on memory maps, and parameters take no memory.

    ready: maps of files that are open already. assign: parameters stay in their file also where ComfyUI would copy
    them, as it does before it makes a patcher. Afterwards, parameters that the files lack are on the meta device.
    Raises FileChanged where a file has changed.
    """
    drop_unloaded()  # a CLIP is loaded as soon as it is built
    guards, keeps_map = ExitStack(), assign
    opened = Opened(guards)
    known = {str(disk_map.path): disk_map for disk_map in ready}

    def make_patcher(_: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        patcher = dynamic_patcher(model, *args, **kwargs)
        patcher.policy = policy or Policy()
        model.spillway_maps = opened.maps
        model.spillway_path = opened.paths
        return patcher

    def load_file(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).lower().endswith(PICKLES):
            return load(path, *args, **kwargs)
        ready_map = known.get(str(Path(path)))
        disk_map = open_map(path) if ready_map is None else ready_map
        opened.use(disk_map)
        opened.sources.append(disk_map)
        check_quantised(disk_map)
        if disk_map.left_out:
            log.warning("[Spillway] %s", f"{disk_map.path}:{_left_out_words([disk_map])}")
        tensors = disk_map.state_dict()
        opened.watch(disk_map, tensors)
        with_metadata = kwargs.get("return_metadata", args[2] if len(args) > 2 else False)
        return (tensors, disk_map.metadata) if with_metadata else tensors

    def convert_names(convert: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return convert_lazily(convert, *args, **kwargs)
        except SourceError as error:
            raise SourceError(f"{opened.paths}: {error}") from None

    def load_tensors(
        load: Callable[..., Any], module: torch.nn.Module, tensors: Any, strict: bool = True, assign: bool = False
    ) -> Any:
        for name, part in module.named_modules():
            _accept_short_table(part, tensors.get(f"{name}.weight"))
        check_shapes(module, tensors)
        stays = keeps_map and not assign and not type(module).__module__.startswith(ADAPTERS)
        if stays:
            return _assigned(load, module, tensors, strict)
        if not assign:
            # Copying needs memory to copy into. ComfyUI copies small parts, and models that it never offloads.
            for part in module.modules():
                for attr, parameter in part._parameters.items():
                    if parameter is not None and parameter.is_meta:
                        part._parameters[attr] = parameter_of(torch.empty_like(parameter, device="cpu"))
        with cast_when_used(module, tensors) if assign else nullcontext():
            result = load(module, tensors, strict, assign)
        if assign:
            opened.note(module, result.missing_keys)
        return result

    with (
        CheckBeforeRead(opened.maps),
        guards,
        skip_model_initialization(KEEP_BELOW),
        overridden(comfy.model_patcher, "CoreModelPatcher", by=make_patcher),
        overridden(comfy.utils, "load_torch_file", by=load_file),
        overridden(comfy.model_detection, "convert_diffusers_mmdit", by=convert_names),
        overridden(torch.nn.Module, "load_state_dict", by=load_tensors),
    ):
        yield opened
        for disk_map in opened.maps:
            disk_map.check_unchanged()


def _assigned(load: Callable[..., Any], root: torch.nn.Module, tensors: Mapping[str, Any], strict: bool) -> Any:
    """Assign tensors that ComfyUI would copy into a module's parameters.

    Copying casts to the parameter's dtype, which is noted for the engine. Buffers are copied, as they are small and
    read by any code. What the file lacks keeps memory of its own.
    """
    buffers = {}
    for name, module in root.named_modules():
        for attr, parameter in module._parameters.items():
            if parameter is None:
                continue
            if (f"{name}.{attr}" if name else attr) not in tensors:
                if parameter.is_meta:
                    module._parameters[attr] = parameter_of(torch.empty_like(parameter, device="cpu"))
            elif getattr(module, f"{attr}_comfy_model_dtype", None) is None:
                setattr(module, f"{attr}_comfy_model_dtype", parameter.dtype)
        buffers.update({(module, attr): buffer for attr, buffer in module._buffers.items() if buffer is not None})
    with cast_when_used(root, tensors):
        result = load(root, tensors, strict, True)
    for (module, attr), before in buffers.items():
        now = module._buffers[attr]
        if now is not before and now is not None:
            module._buffers[attr] = now.to(dtype=before.dtype, copy=True)
    return result


def _accept_short_table(part: torch.nn.Module, tensor: Any) -> None:
    """Give an embedding as many rows as its file has, where the others belong to no token."""
    if isinstance(part, torch.nn.Embedding) and torch.is_tensor(tensor) and tensor.dim() == 2:
        tokens = TOKENS_OF_TABLES.get(part.weight.shape[0])
        if tokens is not None and tokens <= tensor.shape[0] < part.weight.shape[0]:
            part.weight = parameter_of(torch.empty(tensor.shape, dtype=part.weight.dtype, device="meta"))


def check_complete(model: torch.nn.Module) -> None:
    """Raises SourceError for a diffusion model with parameters that its file lacked: nothing could be read for them."""
    root = getattr(model, "diffusion_model", None)
    if root is None:
        return
    missing = [name for name, parameter in root.named_parameters() if parameter.is_meta]
    if missing:
        path = getattr(model, "spillway_path", "the file")
        raise SourceError(
            f"{path}: {len(missing)} tensors that {type(root).__name__} needs are missing, such as "
            f"{', '.join(missing[:3])}. The file is incomplete or of another architecture: get a complete one."
            + _left_out_words(getattr(model, "spillway_maps", ()))
        )


def _left_out_words(maps: Iterable[DiskMap]) -> str:
    left_out = [f"{disk_map.path.name}: {', '.join(disk_map.left_out[:3])}" for disk_map in maps if disk_map.left_out]
    words = "; ".join(left_out)
    return f" Tensors of 4 or 6 bits a number were left out, which nothing here can read ({words})." if words else ""


@contextmanager
def opening_indexes() -> Iterator[None]:
    """Inside, ComfyUI's loaders open a model in several files, for a classic model of it.

    They wait until all of a file that is coming is there.
    """

    def load_file(load: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_index(path):
            wait_whole(path)
            return load(path, *args, **kwargs)
        source = open_map(path)
        with_metadata = kwargs.get("return_metadata", args[2] if len(args) > 2 else False)
        return (source.state_dict(), source.metadata) if with_metadata else source.state_dict()

    with overridden(comfy.utils, "load_torch_file", by=load_file):
        yield


def refuse_pickle(path: str) -> None:
    """Raises SourceError, with the way to convert, for a file that cannot be mapped; before anything is built."""
    if is_pickle(path):
        open_map(path)


def detected(make: Callable[[], Any], path: str) -> Any:
    """Run a loader of ComfyUI's. Its complaint about a file that it cannot use becomes an error that names the file."""
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
            f"architecture, or in a form that needs a newer ComfyUI."
        ) from error
    if result is None:
        raise SourceError(f"{path}: no model that ComfyUI knows was found in this file.")
    return result
