"""Makes the forecast of a prompt: each sampler, and the ways out where a model does not fit."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..ops.gguf.header import is_gguf
from ..ops.ledger import first_line, in_words
from ..ops.parts.folder import may_be_model
from ..patcher.comfyui.forecast.sampling import foresee_sampling
from ..patcher.comfyui.loading.load import CHECKPOINT_DTYPES, WEIGHT_DTYPES
from ..patcher.comfyui.quantise.formats import FORMATS
from .forecast_graph import CHECKPOINTS, OURS, NotForeseen, Sampling, lora_paths, samplers, walk
from .graph_policy import read
from .load import model_names

log = logging.getLogger("spillway")

MOST_SAMPLERS = 8
MOST_GGUF = 3
_one_at_a_time = threading.Lock()


def forecast(prompt: dict[str, Any]) -> dict[str, Any]:
    """Foresee a prompt in API format, ready for JSON. Reads headers of files alone, and touches no device.

    samplers: of each, its forecast or why there is none, and ways out, each with its own forecast.
    """
    with _one_at_a_time:
        policy, caps = read(prompt)
        cap = min(caps, default=None)
        found = samplers(prompt)
        return {
            "samplers": [_sampler(prompt, name, policy, cap) for name in found[:MOST_SAMPLERS]],
            "left_out": max(0, len(found) - MOST_SAMPLERS),
        }


def _sampler(prompt: dict[str, Any], name: str, policy: Any, cap: int | None) -> dict[str, Any]:
    told: dict[str, Any] = {"id": name, "kind": prompt[name]["class_type"], "forecast": None, "ways": [], "notes": []}
    try:
        sampling = walk(prompt, name, policy)
        sampling.loaded = lora_paths(sampling.loaded)
        told["forecast"] = _foreseen(sampling, cap)
    except NotForeseen as error:
        told["notes"] = [{"code": error.code, **error.values}]
        return told
    except Exception as error:  # whatever a loader says of a file: the run will say it too
        told["notes"] = [{"code": "error", "words": first_line(error)}]
        return told
    told["loader"] = {"id": sampling.loader, "kind": prompt[sampling.loader]["class_type"]}
    told["notes"] = [{"code": code, **values} for code, values in sampling.notes]
    told["notes"] += [{"code": code} for code in told["forecast"]["unknown"]]
    if told["forecast"]["streamed"] or not told["forecast"]["fits"]:
        told["ways"] = list(_ways_out(prompt, sampling, cap, told["forecast"]))
    return told


def _foreseen(sampling: Sampling, cap: int | None) -> dict[str, Any]:
    return foresee_sampling(sampling.loaded, sampling.latent, sampling.guided, cap)


def _ways_out(
    prompt: dict[str, Any], sampling: Sampling, cap: int | None, now: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Give what a user could set, with what would then be: which widget of which node, and to what."""
    for code, name, widget, value, other in _choices(prompt, sampling):
        try:
            told = _foreseen(other, cap)
        except Exception as error:  # not every model has every format
            log.debug("[Spillway] forecast: %s=%r is no way out: %s", widget, value, first_line(error))
            continue
        if told["streamed"] < now["streamed"] or told["peak"] < now["peak"]:
            kind = prompt[name]["class_type"]
            yield {"code": code, "id": name, "kind": kind, "widget": widget, "value": value, "forecast": told}


def _choices(prompt: dict[str, Any], sampling: Sampling) -> Iterator[tuple[str, str, str, Any, Sampling]]:
    loaded = sampling.loaded
    where = sampling.quantised_by or sampling.loader
    kind = prompt[where]["class_type"]
    if sampling.quantised_by is not None or kind in OURS:
        known = CHECKPOINT_DTYPES if loaded.kind == CHECKPOINTS or sampling.quantised_by else tuple(WEIGHT_DTYPES)
        four = next((name for name in ("nvfp4", "w4a8") if name in FORMATS), None)
        for code, value in (("int8", "int8"), ("four_bits", four)):
            if value in known and value != loaded.weight_dtype and not (is_gguf(loaded.path) and code == "int8"):
                yield code, where, "weight_dtype", value, replace(sampling, loaded=replace(loaded, weight_dtype=value))
    if kind == "SpillwayLoadDiffusionModel" and not is_gguf(loaded.path):
        for name, path in _gguf_beside(loaded.path):
            other = replace(loaded, path=path, weight_dtype="default")
            yield "gguf", where, "unet_name", name, replace(sampling, loaded=other)
    if sampling.latent.batch > 1 and sampling.latent_node is not None:
        smaller = replace(sampling.latent, batch=1)
        yield "batch", sampling.latent_node, "batch_size", 1, replace(sampling, latent=smaller)


def _gguf_beside(path: str) -> list[tuple[str, str]]:
    """List GGUF files of the same model as (name in the list, path): their names begin as the file's does."""
    folder, stem = os.path.split(os.path.splitext(path)[0])
    begins = stem.lower().replace("_", "-")
    for suffix in ("-fp8-e4m3fn-scaled", "-fp8-e4m3fn", "-fp8-scaled", "-fp8", "-bf16", "-fp16", "-fp32"):
        begins = begins.removesuffix(suffix)
    found = []
    for name in model_names("diffusion_models"):
        beside = os.path.join(folder, os.path.basename(name))
        is_same = os.path.basename(name).lower().replace("_", "-").startswith(begins)
        if is_gguf(name) and is_same and (os.path.isfile(beside) or may_be_model(beside)):
            found.append((name, beside))
    return found[:MOST_GGUF]


def in_lines(report: dict[str, Any]) -> str:
    """Word a forecast for people."""
    lines = [] if report["samplers"] else ["There is no sampler in this workflow."]
    for one in report["samplers"]:
        lines.append(f"{one['kind']} ({one['id']}): {_in_a_line(one['forecast'])}")
        lines += [f"  {_note(note)}" for note in one["notes"]]
        for way in one["ways"]:
            lines.append(f"  {way['widget']} of {way['kind']} ({way['id']}) to {way['value']}:")
            lines.append(f"    {_in_a_line(way['forecast'])}")
    if report["left_out"]:
        lines.append(f"{report['left_out']} more samplers are not looked at.")
    return "\n".join(lines)


def _in_a_line(told: dict[str, Any] | None) -> str:
    if told is None:
        return "nothing is foreseen."
    stays = f"{in_words(told['resident'])} of {in_words(told['total'])} stay on {told['device']}"
    streams = f"each step brings {in_words(told['streamed'])}" if told["streamed"] else "nothing is brought"
    least = "" if not told["at_least"] else f", at least {told['at_least']:.2f} s a step"
    how = "as seen in an earlier run" if told["learnt"] else "by ComfyUI's estimate"
    peak = f"the peak is {in_words(told['peak'])} of {in_words(told['device_total'])} ({how})"
    return f"{told['name']}, {told['format']}: {stays}, {streams}{least}; {peak}."


NOTES = {
    "unknown": "what {kind} ({node}) gives is not known: no loader was found behind it.",
    "passed": "{kind} ({node}) is taken for a node that makes the model no larger.",
    "theirs": "{kind} ({node}) is ComfyUI's own: so it would be with a Spillway loader in its place.",
    "wired": "{widget} of {kind} comes by wire, and is known when the workflow runs.",
    "missing": "node {node} is not in the workflow.",
    "circle": "the workflow goes round in a circle.",
    "policy": "the policy of {kind} ({node}) is known when the workflow runs.",
    "size": "the size of the latent is not known: 1024 x 1024 is assumed.",
    "int8_auto": "int8 is taken for faster here. The loader measures that.",
    "int8_lora": "LoRAs are taken to be merged. The run looks at their numbers.",
    "error": "{words}",
}


def _note(note: dict[str, str]) -> str:
    return NOTES[note["code"]].format(**note)
