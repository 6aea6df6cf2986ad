"""Compiles models of other loaders with torch.compile, module by module as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ....ops.compile.compiled_function import compile_count, compiler_settings, reason_of
from .attention import traceable_attention
from .blocks import block_names
from .dynamic_models import INTERRUPT, WHO, WRAPPER_KEY, CompileRequest
from .products import traceable_products

log = logging.getLogger("spillway")


def _ignore_options(entries: Any) -> list[bool]:
    """Say which guards to keep. Guards on transformer options would compile again at every step."""
    return ["transformer_options" not in entry.name for entry in entries]


def compile_arguments(request: CompileRequest) -> dict[str, Any]:
    """Translate a request for torch.compile.

    torch.compile takes a mode or options, never both. With a filter, the mode is given as options.
    """
    arguments: dict[str, Any] = {
        "backend": request.backend,
        "fullgraph": request.fullgraph,
        "dynamic": request.dynamic,
    }
    mode = request.mode if request.backend == "inductor" and request.mode != "default" else None
    if not request.use_guard_filter:
        return {**arguments, "mode": mode}
    options = dict(torch._inductor.list_mode_options(mode)) if mode is not None else {}
    return {**arguments, "options": {**options, "guard_filter_fn": _ignore_options}}


def with_traceable_attention(value: Any) -> Any:
    """Give transformer options an attention that a graph can hold. Anything else stays as it is."""
    if not isinstance(value, dict) or not {"sigmas", "cond_or_uncond"} & set(value):
        return value
    return {"optimized_attention_override": traceable_attention, **value}


class CompiledModel:
    """Wraps `apply_model` and compiles at the first call. Clones of its model share it.

    Compiled modules stand in the model only during a call, as with ComfyUI's own node: patches find the names that they
    know.
    """

    def __init__(self, request: CompileRequest) -> None:
        self.request = request
        self.failed = False
        # Name -> the module, and its compiled form. An object patch may put another module in that place.
        self._by_name: dict[str, tuple[torch.nn.Module, Any]] = {}

    def _compiled(self, model: torch.nn.Module) -> dict[str, Any]:
        names = block_names(model) if self.request.blocks_only else ["diffusion_model"]
        for name in names or ["diffusion_model"]:
            module = comfy.utils.get_attr(model, name)
            known = self._by_name.get(name)
            if known is None or known[0] is not module:
                self._by_name[name] = module, torch.compile(module, **compile_arguments(self.request))
        return {name: compiled for name, (_, compiled) in self._by_name.items()}

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.failed:
            return executor(*args, **kwargs)
        model = executor.class_obj  # type: ignore[attr-defined]
        kept = [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in args]
        before = compile_count()
        try:
            return self._run(executor, model, args, kwargs)
        except Exception as error:
            if isinstance(error, INTERRUPT) or comfy.model_management.is_oom(error):
                raise
            reason = reason_of(error)
        finally:
            graphs = compile_count() - before
            if graphs and self.request.log_compile:
                log.info("[Spillway] %s: %d graphs compiled for %s", WHO, graphs, type(model).__name__)
        # Where the model itself is at fault, this raises the same again.
        result = executor(*kept, **kwargs)
        self.failed = True
        log.warning("[Spillway] %s: compile failed; running uncompiled. %s", WHO, reason)
        return result

    def _run(self, executor: Callable[..., Any], model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        originals: dict[str, Any] = {}
        args = tuple(with_traceable_attention(value) for value in args)
        kwargs = {name: with_traceable_attention(value) for name, value in kwargs.items()}
        try:
            with compiler_settings(self.request.cache_size_limit), traceable_products():
                for name, compiled in self._compiled(model).items():
                    originals[name] = comfy.utils.get_attr(model, name)
                    comfy.utils.set_attr(model, name, compiled)
                return executor(*args, **kwargs)
        finally:
            for name, module in originals.items():
                comfy.utils.set_attr(model, name, module)


def compile_other(model: Any, request: CompileRequest, disable_dynamic_vram: bool) -> Any:
    """Clone a patcher that is not ours. The clone is compiled when it first samples.

    Raises RuntimeError where ComfyUI cannot clone it without its dynamic VRAM.
    """
    clone = model.clone()
    if disable_dynamic_vram and _is_dynamic(model):
        try:
            clone = model.clone(disable_dynamic=True)
        except TypeError as error:
            raise RuntimeError(
                f"{WHO}: this ComfyUI version does not support disable_dynamic clone. Update ComfyUI, start it with "
                "--disable-dynamic-vram, or turn disable_dynamic_vram off in this node."
            ) from error
        except RuntimeError as error:
            raise RuntimeError(
                f"{WHO}: this MODEL cannot be cloned with its dynamic VRAM off ({error}). Load it with a loader of "
                "ComfyUI's or Spillway's, or turn disable_dynamic_vram off in this node."
            ) from error
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY, CompiledModel(request))
    return clone


def _is_dynamic(model: Any) -> bool:
    ask = getattr(model, "is_dynamic", None)
    return ask is not None and bool(ask())
