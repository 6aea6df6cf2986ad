"""Turns a module tree into a dynamic one: its classes, its bundles, its idle parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from ..ops.errors import SpillwayError
from ..ops.files.disk_map import SourceError, check_files
from ..ops.files.source import Source
from ..ops.gather import is_wrapper, memory_of
from ..ops.joined_weight import JoinedWeight
from ..ops.lending.block import Block
from ..ops.lending.bundle import Bundle
from ..ops.lending.layer import dynamic_class, has_forward
from ..ops.lending.param import Param
from ..ops.lending.table import Table, is_table
from ..ops.quantisation import Quantisation
from .policy import Policy

ModelDtype = Callable[[torch.nn.Module, str, torch.Tensor], torch.dtype]
# (module, its name, its weight) -> how that weight is quantised, or None to keep its dtype.
Quantise = Callable[[torch.nn.Module, str, torch.Tensor], Quantisation | None]


class Unsupported(SpillwayError, TypeError):
    """Names a module that cannot be made dynamic, and says why."""


# Tensor classes whose numbers lie in memory one after the other, in pieces perhaps.
PLAIN: tuple[type[torch.Tensor], ...] = (torch.Tensor, JoinedWeight)


def _form_dtype(source: torch.Tensor, wanted: torch.dtype) -> torch.dtype:
    # Cast floating-point numbers only. Integers, indices and packed weights keep their bits.
    return wanted if source.is_floating_point() else source.dtype


# Stock modules that read their children's weights without calling the children. Each gets one bundle for its tree.
WHOLE = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)


def _owner(modules: Mapping[str, torch.nn.Module], name: str, blocks: Collection[str] = ()) -> str:
    """Name the module whose forward needs the parameters of module `name`."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        above = ".".join(parts[:end])
        if above in blocks or isinstance(modules.get(above), WHOLE):
            return above
    while name and not has_forward(modules[name]):
        name = name.rpartition(".")[0]
    return name


def collect_bundles(
    root: torch.nn.Module,
    source: Source | None,
    policy: Policy,
    model_dtype: ModelDtype | None = None,
    quantise: Quantise | None = None,
    blocks: Collection[str] = (),
) -> list[Bundle]:
    """Make the bundles of a module tree, in registration order.

    A module that can be called gets a bundle of its own parameters, a large embedding a table. Parameters of a
    container that cannot be called (a ParameterList) go to the nearest module above that can. `source` has parameters
    by name. Without it, each parameter is its own source.
    model_dtype(module, attr, parameter): the dtype of the final form, by default the parameter's. quantise: which
    weights are quantised, and how. blocks: names of modules that get one bundle for all that is in them. Residency
    rules go by the block's name alone.
    Raises SourceError where the source lacks a parameter or has another shape. Raises Unsupported for recurrent layers
    and for unknown tensor classes.
    """
    where = getattr(source, "path", "the source")
    modules = dict(root.named_modules())
    params: dict[str, list[Param]] = {}
    missing: list[str] = []
    tied: dict[int, str] = {}
    if source is not None:
        every = root.named_parameters(remove_duplicate=False)
        tied = {id(parameter): key for key, parameter in every if key in source}
    for name, module in modules.items():
        owner = _owner(modules, name, blocks)
        if isinstance(module, torch.nn.RNNBase):
            raise Unsupported(
                f"'{name}' is a {type(module).__name__}, which keeps its own list of its weights, so they cannot be "
                "lent. Load this model with its own loader."
            )
        for attr, parameter in module._parameters.items():
            if parameter is None:
                continue
            key = f"{name}.{attr}" if name else attr
            dtype = model_dtype(module, attr, parameter) if model_dtype is not None else parameter.dtype
            idle = parameter
            if source is not None:
                # A tied parameter may be in the file under one of its names only.
                stored = key if key in source else tied.get(id(parameter))
                if stored is None:
                    missing.append(key)
                    continue
                tensor = source.tensor(stored)
                if tensor.shape != parameter.shape and not is_wrapper(tensor):
                    raise SourceError(
                        f"{where}: tensor '{key}' has shape {tuple(tensor.shape)}, "
                        f"{type(module).__name__} expects {tuple(parameter.shape)}. The file is of another kind."
                    )
                idle = torch.nn.Parameter(tensor, requires_grad=False)
            data = idle.detach()
            if type(data) not in PLAIN and not is_wrapper(data):
                raise Unsupported(
                    f"'{key}' is a {type(data).__name__}, a tensor class that cannot be laid out in a bundle. "
                    "Load this model with its own loader, or load an unquantised or comfy_quant file here."
                )
            rule = policy.rule_for(name)
            compute = None
            if rule is not None and data.is_floating_point():
                compute = rule.compute_dtype or (dtype if rule.storage_dtype is not None else None)
                dtype = rule.storage_dtype or dtype
            quantised = quantise(module, name, data) if quantise is not None and attr == "weight" else None
            params.setdefault(owner, []).append(
                Param(module, attr, key, idle, _form_dtype(data, dtype), compute, quantised)
            )
    if missing:
        raise SourceError(
            f"{where}: {len(missing)} tensors that {type(root).__name__} needs are missing, "
            f"such as {', '.join(missing[:3])}. The file is incomplete or of another architecture."
        )
    bundles = []
    for name, entries in params.items():
        module = modules[name]
        rule = policy.rule_for(name)
        place = rule.offload if rule is not None else "auto"
        if name in blocks:
            bundle: Bundle = Block(name, module, entries, _members(module, entries))
        elif place not in ("ram", "pin") and is_table(module, entries):
            bundle = Table(name, module, entries)
        else:
            bundle = Bundle(name, module, entries)
        bundle.offload_to = place
        bundles.append(bundle)
    # Registration order is the best guess at the execution order until the first step has run.
    ordered = [bundle for bundle in bundles if not bundle.by_rows]
    for bundle, following in zip(ordered, ordered[1:] + ordered[:1], strict=True):
        bundle.successor = following
    return bundles


def _members(block: torch.nn.Module, params: list[Param]) -> list[torch.nn.Module]:
    """List the modules in a block that can be called and have parameters of their own."""
    owners = dict.fromkeys(param.owner for param in params)
    return [module for module in owners if module is not block and has_forward(module)]


def load_buffers(root: torch.nn.Module, source: Source) -> None:
    """Fill persistent buffers that the source has. Buffers are small and stay where the module is.

    Raises SourceError where the shapes differ.
    """
    where = getattr(source, "path", "the source")
    for name, module in root.named_modules():
        for attr, buffer in list(module._buffers.items()):
            key = f"{name}.{attr}" if name else attr
            if buffer is None or key not in source:
                continue
            tensor = source.tensor(key)
            if tensor.shape != buffer.shape:
                raise SourceError(
                    f"{where}: tensor '{key}' has shape {tuple(tensor.shape)}, the buffer of "
                    f"{type(module).__name__} has {tuple(buffer.shape)}. The file is of another kind."
                )
            check_files(memory_of(tensor))
            module._buffers[attr] = tensor.to(dtype=buffer.dtype, copy=True)


def attach(bundles: list[Bundle], device: torch.device | None) -> None:
    """Make the bundles' modules borrow. Swaps their classes and lets idle parameters stand in for the others.

    device: where operations outside of a layer's forward need weights; None where that is host memory.
    """
    for bundle in bundles:
        for module in bundle.borrowers():
            module.__class__ = dynamic_class(type(module))
            module.spillway_bundle = bundle  # type: ignore[assignment]
        bundle.stand_in(device)


def detach(bundles: list[Bundle]) -> None:
    """Undo `attach`: give the modules their original classes and parameters back."""
    for bundle in bundles:
        bundle.let_go()
        for module in bundle.borrowers():
            original = getattr(type(module), "spillway_original_class", None)
            if original is not None:
                module.__class__ = original
            module.__dict__.pop("spillway_bundle", None)
