"""Stands in a few functions of ComfyUI's, where it would read weights past a loan. For models of others they do as
before.

`comfy.ops.cast_bias_weight` gives a module's weight to code that does not call the module: the norms that attention
fuses, a token embedding that is multiplied with again, layers that fuse an activation. Until `uncast_bias_weight` the
weight is lent, so it is planned, pinned and brought ahead like that of any call.

`comfy.model_prefetch.make_prefetch_queue` lets ComfyUI bring the layers of its own models ahead, and capture them as
CUDA graphs. A captured graph would read a weight where it no longer is.

`pre_run` of ControlNets copies weights of the controlled model out of its state dict (Control-LoRA: all of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import comfy.controlnet
import comfy.ops
import torch

from ...ops.lending.bundle import Bundle, Lending
from ...ops.lending.idle_weight import state_dicts_to_compute_with

try:
    import comfy.model_prefetch as prefetch
except ImportError:  # before ComfyUI 0.24
    prefetch = None


class OpenLoan:
    """A loan between cast and uncast, in the place of what ComfyUI hands from the one to the other.

    Code that fails in between never calls `uncast_bias_weight`. The loan then ends with the last reference to it.
    """

    def __init__(self, bundle: Bundle, lending: Lending) -> None:
        self.bundle, self.lending = bundle, lending
        self.token: Any = None  # ComfyUI's own

    def end(self) -> None:
        lending, self.lending = self.lending, None  # type: ignore[assignment]
        if lending is not None:
            lending.exit(self.bundle)

    def __del__(self) -> None:
        self.end()


def _lend_between(owner: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make functions in the place of the owner's. Every layer of every model calls them, so each is one frame."""
    cast, uncast = owner.cast_bias_weight, owner.uncast_bias_weight

    def cast_bias_weight(module: Any, *args: Any, **kwargs: Any) -> Any:
        bundle = module.__dict__.get("spillway_bundle")  # torch's own lookup costs more where there is none
        if bundle is None or bundle.depth or not kwargs.get("offloadable"):
            return cast(module, *args, **kwargs)
        loan = OpenLoan(bundle, bundle.lender.enter(bundle))
        try:
            weight, bias, loan.token = cast(module, *args, **kwargs)
        except BaseException:
            loan.end()
            raise
        return weight, bias, loan

    def uncast_bias_weight(module: Any, weight: Any, bias: Any, token: Any) -> Any:
        if not isinstance(token, OpenLoan):
            return uncast(module, weight, bias, token)
        try:
            return uncast(module, weight, bias, token.token)
        finally:
            token.end()

    return cast_bias_weight, uncast_bias_weight


def _queue(original: Callable[..., Any], queue: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Make no queue for layers that are lent."""
    return None if any(map(_is_lent, queue)) else original(queue, *args, **kwargs)


def _is_lent(unit: torch.nn.Module | Iterable[torch.nn.Module]) -> bool:
    roots = (unit,) if isinstance(unit, torch.nn.Module) else unit
    return any(vars(module).get("spillway_bundle") is not None for root in roots for module in root.modules())


def _pre_run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Give a ControlNet that borrows weights of the model that it controls what that model computes with."""
    with state_dicts_to_compute_with():
        return original(*args, **kwargs)


def _stand_in(owner: Any, name: str, by: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        return by(original, *args, **kwargs)

    setattr(owner, name, function)


def _install() -> None:
    if hasattr(comfy.ops, "uncast_bias_weight"):
        comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight = _lend_between(comfy.ops)
    for control in vars(comfy.controlnet).values():
        if isinstance(control, type) and "pre_run" in vars(control):
            _stand_in(control, "pre_run", _pre_run)
    if prefetch is not None:
        _stand_in(prefetch, "make_prefetch_queue", _queue)


_install()  # once, as Python imports a module once
