"""Notes how large what a model computes is, in words by which a forecast finds what an earlier run of it has shown."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import comfy.sd

from ...ops.never_raises import never_raises
from .model_state import ModelState, state_of

TEXT = "text"  # prompts are of any length, and mostly small beside the weights


def of_sampling(latent: Sequence[int], guided: bool) -> str:
    """Name a sampling: '1x16x64x64 guided'. guided: with more than one condition in a step."""
    return f"{_in_words(latent)} guided" if guided else _in_words(latent)


def of_vae(way: str, shape: Sequence[int], tile: Sequence[int] = ()) -> str:
    """Name what a VAE does. way: 'decode' or 'encode'; shape: of latents, or of images [N, height, width, channels].

    tile: its sides, as ComfyUI's tiled functions take them; empty for one piece.
    """
    return f"{way} {_in_words(shape)} by {_in_words(tile)}" if tile else f"{way} {_in_words(shape)}"


def _in_words(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def is_guided(guider: Any) -> bool:
    """Say whether a guider computes more than one condition in a step, as ComfyUI leaves one out at a CFG of 1."""
    known = set(getattr(guider, "conds", None) or getattr(guider, "original_conds", ()))
    if known == {"positive", "negative"}:
        return not math.isclose(guider.cfg, 1.0)
    return len(known) > 1


def install() -> None:
    """Note the size of each sampling and of each use of a VAE, for models of ours. A second call does nothing."""
    if hasattr(comfy.sampler_helpers.prepare_sampling, "spillway_original"):
        return
    guider = comfy.samplers.CFGGuider
    _before(comfy.sampler_helpers, "prepare_sampling", _sampling)
    _before(guider, "outer_sample", _guider)
    for way in ("decode", "encode"):
        _before(comfy.sd.VAE, way, functools.partial(_vae, way))
        _before(comfy.sd.VAE, f"{way}_tiled", functools.partial(_vae, way))


def _before(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Call `note` with the arguments of a function before each call of it."""
    original = getattr(owner, name)
    noted = never_raises(f"noting the size of {name}")(note)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        noted(*args, **kwargs)
        return original(*args, **kwargs)

    call.spillway_original = original  # type: ignore[attr-defined]
    setattr(owner, name, call)


def _state(patcher: Any) -> ModelState | None:
    return state_of(getattr(patcher, "model", None))  # type: ignore[arg-type]


def _guider(guider: Any, *_: Any, **__: Any) -> None:
    state = _state(guider.model_patcher)
    if state is not None:
        state.guided = is_guided(guider)


def _sampling(model: Any, noise_shape: Sequence[int], *_: Any, **__: Any) -> None:
    state = _state(model)
    if state is not None:
        state.announce(of_sampling(tuple(noise_shape), state.guided))


def _vae(
    way: str,
    vae: Any,
    given: Any,
    tile_x: Any = None,
    tile_y: int | None = None,
    *_: Any,
    **__: Any,
) -> None:
    state = _state(getattr(vae, "patcher", None))
    if state is not None:  # what follows the latents of an untiled decoding is no tile, but options
        tile = (tile_x, tile_y) if isinstance(tile_x, int) and tile_y is not None else ()
        state.announce(of_vae(way, tuple(given.shape), tile))
