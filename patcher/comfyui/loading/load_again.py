"""Loads a model once more from its file, as ComfyUI's nodes do for another device."""

from __future__ import annotations

from typing import Any

from ...policy import Policy
from ..patcher import DynamicModelPatcher
from .loader_overrides import building, opening_indexes


def load_again(factory: Any, arguments: tuple, policy: Policy | None, disable_dynamic: bool = False) -> Any:
    """Load a part of a file once more -> its patcher, or several.

    disable_dynamic: give ComfyUI's classic patcher instead.
    """
    if disable_dynamic:
        with opening_indexes():
            return factory(*arguments, disable_dynamic=True)
    with building(DynamicModelPatcher, policy):
        return factory(*arguments)


def keep_dynamic(patcher: Any, policy: Policy | None) -> None:
    """Have ComfyUI load the patcher's model again through `load_again`. By itself it would make one of its own."""
    way = getattr(patcher, "cached_patcher_init", None)
    if way is not None:
        patcher.cached_patcher_init = (load_again, (*way[:2], policy), *way[2:])
