"""The index of a model in several safetensors files, checked. Needs no torch."""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from ..files.safetensors_header import AGAIN, MAX_HEADER_BYTES, PICKLED_INDEX, MissingFile, SourceError, is_pickle
from ..gguf.header import is_gguf

# model.safetensors.index.json; model.safetensors.index.fp16.json for a variant.
NAME = re.compile(r"\.safetensors\.index(\.\w+)?\.json$", re.IGNORECASE)
# Of a file, in bytes, on all usual file systems.
LONGEST_NAME = 255
PART = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.\w+)$")


class Index(NamedTuple):
    """parts: name of each file -> the keys that it has, in the index's order."""

    path: Path
    parts: dict[str, list[str]]


def is_index(path: str | os.PathLike[str]) -> bool:
    """Say whether a file is such an index by its name."""
    return NAME.search(Path(path).name) is not None


def is_pickled_index(path: str | os.PathLike[str]) -> bool:
    """Say whether a file is the index of a model in several pickles by its name."""
    return PICKLED_INDEX.search(Path(path).name) is not None


def read_index(path: str | os.PathLike[str]) -> Index:
    """Read an index. Raises SourceError for a malformed one, and for parts that do not lie beside it."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path}: no such file.")
    with open(path, "rb") as file:
        text = file.read(MAX_HEADER_BYTES + 1)
    if len(text) > MAX_HEADER_BYTES:
        raise SourceError(f"{path}: an index of more than {MAX_HEADER_BYTES} bytes is none. {AGAIN}")
    twice: list[str] = []
    try:
        words = str(text.removeprefix(BOM_UTF8), "utf-8")
        found = json.loads(words, object_pairs_hook=lambda pairs: _object(pairs, twice))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the index is not JSON ({error}). {AGAIN}") from None
    if twice:
        raise SourceError(f"{path}: the index has '{twice[0]}' twice; expected each key once. {AGAIN}")
    where = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(where, dict) or not where:
        raise SourceError(
            f"{path}: the index has no weight_map; expected an object of tensors' names and the files they are in. "
            f"{AGAIN}"
        )
    parts: dict[str, list[str]] = {}
    for key, name in where.items():
        if not isinstance(name, str) or not _is_beside(name):
            raise SourceError(
                f"{path}: the index says that '{key}' is in {_short(name)}; expected the name of a file in its folder. "
                "It is not opened. Get the index again from its maker."
            )
        parts.setdefault(name, []).append(key)
    return Index(path, parts)


def _object(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice += [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    return found


def _short(name: Any) -> str:
    words = repr(name)
    return words if len(words) <= LONGEST_NAME else f"{words[:40]}…"


def _is_beside(name: str) -> bool:
    """Say whether a name stays within its folder on every system."""
    if not name or "\0" in name or not PurePosixPath(name).name:
        return False
    if len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME:
        return False  # asking for such a file is an error of the system's
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(name)
        if path.anchor or path.is_absolute() or ".." in path.parts:
            return False
    return True


class Part(NamedTuple):
    """What a file's name says of it: number, of how many, of which model."""

    number: int
    total: int
    model: str


def part_of(path: str | os.PathLike[str]) -> Part | None:
    """Say which part of a model a file is, by its name. None for a whole one."""
    found = PART.match(Path(path).name)
    if found is None or int(found[3]) < 2:
        return None
    return Part(int(found[2]), int(found[3]), found[1])


def model_of(index: str | os.PathLike[str]) -> str:
    """Return what the names of a model's parts begin with, by the name of its index."""
    name = Path(index).name
    found = NAME.search(name) or PICKLED_INDEX.search(name)
    return name if found is None else f"{name[: found.start()]}{found[1] or ''}"


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return a file, and with an index all parts of its model that lie beside it, by their names alone."""
    path = Path(path)
    if not (is_index(path) or is_pickled_index(path)):
        return [path]
    names = sorted(os.listdir(path.parent))
    return [path, *(path.with_name(name) for name in names if is_part_of(name, path))]


def is_part_of(name: str, index: str | os.PathLike[str]) -> bool:
    """Say whether a file is a part of the model that an index beside it is of, by their names."""
    part = part_of(name)
    return part is not None and part.model == model_of(index) and is_pickle(name) == is_pickled_index(index)


def index_of(path: str | os.PathLike[str]) -> Path | None:
    """Return the index beside a part that is of the part's model; None where there is none."""
    path, part = Path(path), part_of(path)
    if part is None:
        return None
    stem, _, variant = part.model.rpartition(".")
    kind = _kind(path)
    names = [f"{part.model}{kind}.index.json"]
    if stem:
        names += [f"{stem}{kind}.index.{variant}.json"]
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def refuse_part(path: str | os.PathLike[str]) -> None:
    """Raise SourceError, with what to choose instead, for a file that is a part of a model."""
    words = part_words(path)
    if words:
        raise SourceError(f"{path}: {words}")


def part_words(path: str | os.PathLike[str]) -> str:
    """Say which part of a model a file is, and what to choose instead. '' for a whole one."""
    part = part_of(path)
    if part is None:
        return ""
    if is_gguf(path):
        return (
            f"this is part {part.number} of {part.total} of '{part.model}', which is no model by itself. Join the "
            "parts with llama.cpp's `llama-gguf-split --merge`."
        )
    index, kind = index_of(path), _kind(path)
    how = ", and convert it with the node Convert to Safetensors (Spillway)" if is_pickle(path) else ""
    words = f"this is part {part.number} of {part.total} of '{part.model}', which is no model by itself."
    if index is not None:
        return f"{words} Choose '{index.name}' beside it, which stands for all parts{how}."
    return f"{words} Put the other parts and the model's index, '{part.model}{kind}.index.json', beside it, and " + (
        f"choose the index{how}."
    )


def _kind(part: str | os.PathLike[str]) -> str:
    """Return what stands before `.index` in the name of a part's index."""
    return ".bin" if is_pickle(part) else ".safetensors"
