"""Says which modules of ComfyUI's models are transformer blocks, and prepares their arguments for torch.compile.

A block gets `transformer_options`, a dictionary that differs from block to block and from step to step. Its entries are
there for patches: functions that other nodes put in, and the bookkeeping that these functions read.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import comfy.model_management
import torch

from ....ops.compile.skeleton import plain_class
from ....ops.lending.layer import has_forward
from .attention import traceable_attention

# Names of the lists of blocks in ComfyUI's diffusion models.
LISTS = frozenset(
    (
        "blocks",
        "context_refiner",
        "double_blocks",
        "double_layers",
        "double_stream_blocks",
        "joint_blocks",
        "layers",
        "noise_refiner",
        "single_blocks",
        "single_layers",
        "single_stream_blocks",
        "single_transformer_blocks",
        "text_transformer_blocks",
        "transformer_blocks",
        "visual_transformer_blocks",
    )
)
# Entries that ComfyUI's blocks hand on to patches and do not compute with (as read in ComfyUI 0.22 to 0.33).
FOR_PATCHES = frozenset(
    (
        "activations_shape",
        "block",
        "block_index",
        "block_type",
        "callbacks",
        "cond_or_uncond",
        "grid_sizes",
        "img_slice",
        "original_shape",
        "sample_sigmas",
        "sigmas",
        "total_blocks",
        "transformer_index",
        "uuids",
        "wrappers",
    )
)
# Patches that models call between their blocks. They do not keep a block uncompiled.
BETWEEN_BLOCKS = frozenset(
    (
        "double_block",
        "emb_patch",
        "forward_timestep_embed_patch",
        "input_block_patch",
        "input_block_patch_after_skip",
        "noise_refiner",
        "output_block_patch",
        "post_input",
        "single_block",
    )
)


def block_names(model: torch.nn.Module) -> list[str]:
    """List the transformer blocks in a model, or the members of its outermost lists where no list has a known name."""
    root = getattr(model, "diffusion_model", model)
    prefix = "diffusion_model." if root is not model else ""
    lists = [(name, module) for name, module in root.named_modules() if isinstance(module, torch.nn.ModuleList)]
    known = [(name, module) for name, module in lists if name.rpartition(".")[2] in LISTS]
    blocks: list[str] = []
    for name, module in known or lists:
        if any(name.startswith(f"{outer}.") for outer in blocks):
            continue
        blocks += [
            f"{name}.{index}"
            for index, block in enumerate(module)
            if has_forward(block) and next(block.parameters(), None) is not None
        ]
    return [prefix + name for name in blocks]


def is_comfyuis(module: torch.nn.Module) -> bool:
    """Whether a module is of one of ComfyUI's own classes."""
    return plain_class(module).__module__.startswith("comfy.")


def _holds_functions(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        return depth < 8 and any(_holds_functions(entry, depth + 1) for entry in value.values())
    if isinstance(value, (list, tuple, set)):
        return depth < 8 and any(_holds_functions(entry, depth + 1) for entry in value)
    return callable(value) and not isinstance(value, type)


def without_bookkeeping(options: dict[str, Any]) -> dict[str, Any] | str:
    """Take out of transformer options what is only for patches; or say which patch keeps a block uncompiled."""
    kept = {key: value for key, value in options.items() if key not in FOR_PATCHES}
    patches = [name for name, entries in kept.pop("patches", {}).items() if entries and name not in BETWEEN_BLOCKS]
    replaced = [name for name, entries in kept.pop("patches_replace", {}).items() if entries]
    names = [*patches, *replaced, *(key for key, value in kept.items() if _holds_functions(value))]
    if names:
        return f"a node patches its inside ({', '.join(sorted(names))})"
    return kept


@functools.cache
def _options_parameter(block_class: type) -> tuple[int, bool] | None:
    """Find the place of a forward's transformer options, and whether an empty dictionary is their default."""
    parameters = list(inspect.signature(block_class.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    for index, parameter in enumerate(parameters):
        if parameter.name == "transformer_options":
            return index, parameter.default == {}
    return None


def prepare(
    block: torch.nn.Module, args: tuple, kwargs: dict[str, Any], *, ignore: bool = True
) -> tuple[tuple, dict[str, Any]] | str:
    """Prepare a block's arguments for its compiled form, or say why it must run uncompiled: see BlockCompiler.

    ignore: take out of the options of ComfyUI's blocks what is only for patches. Blocks of others keep it, as they may
    compute with it. Raises ComfyUI's interrupt where the user asked for one.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    parameter = _options_parameter(plain_class(block))
    if parameter is None:
        return args, kwargs
    index, optional = parameter
    positional = index < len(args)
    options = args[index] if positional else kwargs.get("transformer_options", {} if optional else None)
    if not isinstance(options, dict):
        return args, kwargs
    kept = without_bookkeeping(options) if ignore and is_comfyuis(block) else dict(options)
    if isinstance(kept, str):
        return kept
    kept.setdefault("optimized_attention_override", traceable_attention)
    if positional:
        return (*args[:index], kept, *args[index + 1 :]), kwargs
    return args, {**kwargs, "transformer_options": kept}
