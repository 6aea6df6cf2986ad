"""Checks what comes into a node before it runs.

ComfyUI lets any literal through that a prompt has in the place of a wire, and NaN in the place of a number. A wire of
any type brings any value, which ComfyUI compares with no range and no list. Kept in a model, a wrong value would raise
long after the node had ended, where no error is allowed.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import reprlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from comfy_api.latest import io

from ..ops.writable import is_writable
from ..patcher.policy import Policy
from .inputs import ChosenLora, OpenChoice, PolicyType


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: all(hasattr(value, name) for name in names)


# By wire type: a test of the value and where such a value comes from. Other packs have classes of their own, so most
# tests look at attributes. ComfyUI's CLIP can decode and encode too.
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    PolicyType.io_type: (lambda value: isinstance(value, Policy), "a Spillway Policy node"),
    io.Model.io_type: (_has("model", "clone"), "a node that loads a model"),
    io.Clip.io_type: (_has("patcher", "clone"), "a node that loads a text encoder"),
    io.Vae.io_type: (_has("decode", "encode", "first_stage_model"), "a node that loads a VAE"),
    io.ClipVision.io_type: (_has("patcher", "model"), "a node that loads a CLIP vision model"),
    io.Latent.io_type: (
        lambda value: isinstance(value, dict) and hasattr(value.get("samples"), "shape"),
        "a node that makes or encodes a latent",
    ),
    io.Image.io_type: (
        lambda value: isinstance(value, torch.Tensor) and value.ndim == 4,
        "a node that loads or makes images",
    ),
    # Inputs that grow come as one dict. The only ones are for LoRAs.
    "COMFY_AUTOGROW_V3": (
        lambda value: (
            isinstance(value, dict) and all(one is None or isinstance(one, ChosenLora) for one in value.values())
        ),
        "a LoRA (Spillway) node",
    ),
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
    # As in ComfyUI, the node itself sees to the inputs that its validate_inputs takes.
    own = set(inspect.signature(node.validate_inputs).parameters)

    @functools.wraps(execute)
    def checked(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        for entry in schema().inputs:
            if entry.io_type in KINDS:
                _check_wire(schema().display_name, entry, given.get(entry.id))
        for entry in _check_values(schema(), given, own):
            named.pop(entry.id, None)  # as where nothing was given: the default holds
        return execute(*arguments, **named)

    return checked


def values_of(node: type[io.ComfyNode], given: dict[str, Any]) -> dict[str, Any]:
    """Check the values that a prompt has for a node, but wires, as the node does when it runs.

    Returns them without those that are left out. Raises ValueError, which names the input.
    """
    left_out = {entry.id for entry in _check_values(node.define_schema(), given)}
    return {name: value for name, value in given.items() if name not in left_out}


def _check_values(schema: io.Schema, given: dict[str, Any], own: Collection[str] = ()) -> list[io.Input]:
    """Check values, and return the inputs that are left out though they were given. own: the node sees to these."""
    left_out = []
    for entry in schema.inputs:
        if entry.io_type in KINDS or entry.id not in given or entry.id in own:
            continue
        if given[entry.id] is None and entry.optional:
            left_out.append(entry)
        else:
            _check_value(schema.display_name, entry, given[entry.id])
    return left_out


def _check_wire(node: str, entry: io.Input, value: Any) -> None:
    accepts, source = KINDS[entry.io_type]
    if accepts(value) or (value is None and entry.optional):
        return
    advice = f"Connect it to {source}" + (", or leave it unconnected." if entry.optional else ".")
    raise ValueError(
        f"{node}: the input '{entry.id}' is {_in_words(value)}; expected a wire of type {entry.io_type}. {advice}"
    )


def _check_value(node: str, entry: io.Input, value: Any) -> None:
    expected = _expected(entry, value)
    if expected is not None:
        raise ValueError(f"{node}: the input '{entry.id}' is {_in_words(value)}; expected {expected}.")


def _expected(entry: io.Input, value: Any) -> str | None:
    """Say what an input takes, where it does not take this value. None where it does."""
    if isinstance(entry, io.String.Input | io.Combo.Input) and isinstance(value, str) and not is_writable(value):
        # ComfyUI could not write an error about it to its log, and that would end the thread that runs prompts.
        return "text that can be written as UTF-8"
    if isinstance(entry, io.Int.Input | io.Float.Input):
        whole = isinstance(entry, io.Int.Input)
        kind, words = (numbers.Integral, "a whole number") if whole else (numbers.Real, "a number")
        # NaN is in no range.
        fits = isinstance(value, kind) and entry.min <= value <= entry.max
        return None if fits else f"{words} from {entry.min:g} to {entry.max:g}"
    if isinstance(entry, io.Boolean.Input):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(entry, io.String.Input | OpenChoice):
        return None if isinstance(value, str) else "text"
    if isinstance(entry, io.Combo.Input):
        return None if isinstance(value, str) and value in entry.options else f"one of {', '.join(entry.options)}"
    return None


def _in_words(value: Any) -> str:
    return "empty" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"
