"""Checks what comes in through a node's wires before the node runs.

ComfyUI lets any literal through that a prompt has in the place of a wire. A wire of any type brings any value too. Kept
in a model, a wrong value would raise long after the node had ended, where no error is allowed.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io

from ..patcher.policy import Policy
from .inputs import PolicyType


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


# By wire type: a test of the value and where such a value comes from. Other packs have classes of their own, so most
# tests look at attributes.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    PolicyType.io_type: (lambda value: isinstance(value, Policy), "a Spillway Policy node"),
    io.Model.io_type: (_has("model", "clone"), "a node that loads a model"),
    io.Clip.io_type: (_has("patcher", "clone"), "a node that loads a text encoder"),
    io.Vae.io_type: (_has("decode", "encode"), "a node that loads a VAE"),
    io.ClipVision.io_type: (_has("patcher", "model"), "a node that loads a CLIP vision model"),
    io.Latent.io_type: (
        lambda value: isinstance(value, dict) and hasattr(value.get("samples"), "shape"),
        "a node that makes or encodes a latent",
    ),
    io.Image.io_type: (lambda value: isinstance(value, torch.Tensor), "a node that loads or makes images"),
}


class CheckedNode(io.ComfyNode):
    """Runs a node only with what its schema says. Otherwise raises ValueError, which names the input."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        execute = cls.__dict__.get("execute")
        if execute is not None and not hasattr(execute.__func__, "__wrapped__"):  # ComfyUI makes copies of the class
            cls.execute = classmethod(_checked(cls, execute.__func__))


def _checked(node: type[io.ComfyNode], execute: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(execute)
    # Define the schema when the node first runs, not at import: a schema lists files.
    schema = functools.cache(node.define_schema)

    @functools.wraps(execute)
    def checked(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        for entry in schema().inputs:
            if entry.io_type in KINDS:
                _check(schema().display_name, entry, given.get(entry.id))
        return execute(*arguments, **named)

    return checked


def _check(node: str, entry: io.Input, value: Any) -> None:
    accepts, source = KINDS[entry.io_type]
    if accepts(value) or (value is None and entry.optional):
        return
    given = "empty" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"
    advice = f"Connect it to {source}" + (", or leave it unconnected." if entry.optional else ".")
    raise ValueError(f"{node}: the input '{entry.id}' is {given}; expected a wire of type {entry.io_type}. {advice}")
