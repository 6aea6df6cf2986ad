"""What could be set where something does not fit, and what is kept of it: that which takes less."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..ops.gguf.header import is_gguf
from ..ops.ledger import first_line
from ..ops.parts.folder import may_be_model
from ..patcher.comfyui.quantise.formats import FORMATS
from .forecast_walk import Found, NotForeseen
from .load import model_names

log = logging.getLogger("spillway")

MOST_GGUF = 3
Other = TypeVar("Other", bound=Found)
# The code of its words, the id of the node, what is done to it, and what it would then be.
Choice = tuple[str, str, dict[str, Any], Other]


def widget(name: str, value: Any) -> dict[str, Any]:
    """Give the change that sets a widget."""
    return {"widget": name, "value": value}


def swap(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """Give the change that puts a node of another class there, with the same wires and these values of its widgets."""
    return {"swap": kind, "values": values}


def better(
    prompt: dict[str, Any],
    choices: Iterable[Choice[Other]],
    foreseen: Callable[[Other], dict[str, Any]],
    now: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Give each choice that takes less than now, with what would then be."""
    for code, name, change, other in choices:
        try:
            told = foreseen(other)
        except Exception as error:  # not every model has every format
            log.debug("[Spillway] forecast: %s is no way out: %s", change, first_line(error))
            continue
        if told["streamed"] < now["streamed"] or told["peak"] < now["peak"]:
            yield {"code": code, "id": name, "kind": prompt[name]["class_type"], **change, "forecast": told}


def told_of(prompt: dict[str, Any], name: str, look: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Give what is told of a node. look: puts its forecast there, or raises what cannot be known."""
    told: dict[str, Any] = {"id": name, "kind": prompt[name]["class_type"], "forecast": None, "ways": [], "notes": []}
    try:
        look(told)
    except NotForeseen as error:
        told["notes"] = [{"code": error.code, **error.values}]
    except Exception as error:  # whatever a loader says of a file: the run will say it too
        told["notes"] = [{"code": "error", "words": first_line(error)}]
    return told


def note(told: dict[str, Any], prompt: dict[str, Any], found: Found) -> None:
    """Say of a node with a forecast which loader it is of, and what was taken for granted."""
    told["loader"] = {"id": found.loader, "kind": prompt[found.loader]["class_type"]}
    told["notes"] = [{"code": code, **values} for code, values in found.notes]
    told["notes"] += [{"code": code} for code in told["forecast"]["unknown"]]


def four_bits() -> str | None:
    """Name the format of 4 bits that this ComfyUI has; None for none."""
    return next((name for name in ("nvfp4", "w4a8") if name in FORMATS), None)


def gguf_beside(path: str, listed: str) -> list[tuple[str, str]]:
    """List GGUF files of the same model as (name in the list, path): their names begin as the file's does.

    listed: the folder of ComfyUI's that lists the file.
    """
    folder, stem = os.path.split(os.path.splitext(path)[0])
    begins = stem.lower().replace("_", "-")
    for suffix in ("-fp8-e4m3fn-scaled", "-fp8-e4m3fn", "-fp8-scaled", "-fp8", "-bf16", "-fp16", "-fp32"):
        begins = begins.removesuffix(suffix)
    found = []
    for name in model_names(listed):
        beside = os.path.join(folder, os.path.basename(name))
        is_same = os.path.basename(name).lower().replace("_", "-").startswith(begins)
        if is_gguf(name) and is_same and (os.path.isfile(beside) or may_be_model(beside)):
            found.append((name, beside))
    return found[:MOST_GGUF]
