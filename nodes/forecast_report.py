"""Makes the forecast of a prompt: each sampler, text encoder and VAE, and the ways out where something does not fit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..ops.gguf.header import is_gguf
from ..patcher.comfyui.forecast.sampling import foresee_sampling
from ..patcher.comfyui.loading.load import CHECKPOINT_DTYPES, WEIGHT_DTYPES
from .forecast_graph import CHECKPOINTS, OURS, Sampling, samplers, walk
from .forecast_use_report import told_of_uses
from .forecast_walk import lora_paths
from .forecast_ways import Choice, better, four_bits, gguf_beside, note, told_of, widget
from .graph_policy import read

MOST_SAMPLERS = 8
_one_at_a_time = threading.Lock()


def forecast(prompt: dict[str, Any]) -> dict[str, Any]:
    """Foresee a prompt in API format, ready for JSON. Reads headers of files alone, and touches no device.

    samplers: of each, its forecast or why there is none, and ways out, each with its own forecast. uses: the same of
    each text encoder, and of each node that decodes or encodes pictures. left_out: how many of both are not looked at.
    """
    with _one_at_a_time:
        policy, caps = read(prompt)
        cap = min(caps, default=None)
        found = samplers(prompt)
        others, more = told_of_uses(prompt, policy, cap)
        return {
            "samplers": [_sampler(prompt, name, policy, cap) for name in found[:MOST_SAMPLERS]],
            "uses": others,
            "left_out": max(0, len(found) - MOST_SAMPLERS) + more,
        }


def _sampler(prompt: dict[str, Any], name: str, policy: Any, cap: int | None) -> dict[str, Any]:
    def look(told: dict[str, Any]) -> None:
        sampling = walk(prompt, name, policy)
        sampling.loaded = lora_paths(sampling.loaded)
        now = told["forecast"] = _foreseen(sampling, cap)
        note(told, prompt, sampling)
        if now["streamed"] or not now["fits"]:
            told["ways"] = list(better(prompt, _choices(prompt, sampling), lambda other: _foreseen(other, cap), now))

    return told_of(prompt, name, look)


def _foreseen(sampling: Sampling, cap: int | None) -> dict[str, Any]:
    return foresee_sampling(sampling.loaded, sampling.latent, sampling.guided, cap)


def _choices(prompt: dict[str, Any], sampling: Sampling) -> Iterator[Choice[Sampling]]:
    """Give what could be set, with what would then be sampled."""
    loaded = sampling.loaded
    where = sampling.quantised_by or sampling.loader
    kind = prompt[where]["class_type"]
    if sampling.quantised_by is not None or kind in OURS:
        known = CHECKPOINT_DTYPES if loaded.kind == CHECKPOINTS or sampling.quantised_by else tuple(WEIGHT_DTYPES)
        for code, value in (("int8", "int8"), ("four_bits", four_bits())):
            if value in known and value != loaded.weight_dtype and not (is_gguf(loaded.path) and code == "int8"):
                other = replace(sampling, loaded=replace(loaded, weight_dtype=value))
                yield code, where, widget("weight_dtype", value), other
    if kind == "SpillwayLoadDiffusionModel" and not is_gguf(loaded.path):
        for name, path in gguf_beside(loaded.path, "diffusion_models"):
            other = replace(loaded, path=path, weight_dtype="default")
            yield "gguf", where, widget("unet_name", name), replace(sampling, loaded=other)
    if sampling.latent.batch > 1 and sampling.latent_node is not None:
        smaller = replace(sampling.latent, batch=1)
        yield "batch", sampling.latent_node, widget("batch_size", 1), replace(sampling, latent=smaller)
