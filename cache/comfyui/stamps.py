"""What an output was made from beside its inputs: the files that they name, and its node's source, as they were then.

A key names files only. An output is made at one time, evicted at another and found at a third, and a file may change in
between: so its stamps are taken when it is made, are written with it, and must hold when it is found.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import folder_paths
import nodes

from ...ops.files.coming_file import coming_file
from ...ops.parts.index import files_of
from ..content import content_of
from ..process_start import process_start
from .first_seen import is_ours

# Size, time of the last change of the content, number, time of the last change of any kind, hash of the content, path
# within the folder that was named. On some systems nobody can set the fourth. On others (Windows, network drives) it
# says nothing, and the hash must do.
Stamp = list[Any]
# What lies in one place that a name may mean: the file, or those of a folder or of an index.
Place = list[Stamp]
# (kind, name) -> what was there.
Stamps = dict[tuple[str, str], Any]

STARTED = process_start()  # nanoseconds since 1970
MAX_SOURCES = 5000
# Each file of a folder that is named is sampled.
MAX_FILES = 1000
EMBEDDING = "embedding:"
EMBEDDING_SUFFIXES = ("", ".safetensors", ".pt", ".bin")
# Some packs read LoRAs' names out of texts.
LORA = re.compile(r"<\w+:([^:<>]+)")
LORA_SUFFIXES = ("", ".safetensors", ".pt", ".ckpt")
# So others' nodes name files of texts, one of which is put in its place. Which folders they look into, and into which
# files there, only they know.
WILDCARD = re.compile(r"__[^\s_][^\n]*?__")
ADDRESS = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://\S+\s*")
LONGEST_NAME = 1024
CODE = (".py", ".so", ".pyd", ".dll")
# What packs write beside their code says what they did.
NO_DATA = (*CODE, ".pyc", ".log", ".tmp", ".lock")

NO_FOLDERS = ("__pycache__", "node_modules")

_sources: dict[type, Any] = {}


def as_record(stamps: Stamps) -> list[list[Any]]:
    """Stamps as plain data, for JSON."""
    return [[*name, value] for name, value in sorted(stamps.items())]


def from_record(record: Iterable[Any]) -> Stamps:
    """The stamps of `as_record`."""
    return {(kind, name): value for kind, name, value in record}


def still_hold(record: Iterable[Any]) -> bool:
    """Whether everything is as it was when these stamps were taken."""
    return all(look(kind, name) == value for (kind, name), value in from_record(record).items())


def stamps_of(node: Mapping[str, Any]) -> Stamps:
    """What a node's own inputs name, as it is now, and its source."""
    return looked_up(names_of(node), look)


def looked_up(names: Iterable[tuple[str, str]], look: Callable[[str, str], Any]) -> Stamps:
    """What is there under names. look: as the one below, or one that remembers."""
    found = {name: look(*name) for name in names}
    # A word that names nothing now may do so later, if it looks like a file's name.
    return {name: value for name, value in found.items() if value != [] or _looks_like_a_file(*name)}


def names_of(node: Mapping[str, Any]) -> set[tuple[str, str]]:
    """All that a node's own inputs may name, its source, and what lies beside that."""
    own = node.get("class_type")
    names = {("source", own), ("data", own)} if own else set()
    for text in _strings(node.get("inputs")):
        if WILDCARD.search(text):
            names.add(("wildcards", ""))
        # What Spillway brings from an address lies here, and its name is that of a file.
        if ADDRESS.fullmatch(text) and not is_ours(nodes.NODE_CLASS_MAPPINGS.get(own, object)):
            names.add(("address", text))
        if EMBEDDING in text:
            names.update(("embedding", name) for name in _embedding_names(text))
        if "<" in text:
            names.update(("lora", name.strip()) for name in LORA.findall(text))
        if len(text) <= LONGEST_NAME and not {"\0", "\n"} & set(text):
            names.add(("file", text))
    return names


def look(kind: str, name: str) -> Any:
    """What is there under a name; None where it cannot be told."""
    return LOOKS[kind](name)


def _strings(value: Any) -> Iterator[str]:
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict | list | tuple) and id(one) not in seen:  # an output may hold itself
            seen.add(id(one))
            pending.extend(one.values() if isinstance(one, dict) else one)


def _looks_like_a_file(kind: str, name: str) -> bool:
    return kind != "file" or os.path.splitext(name.split(" [")[0])[1] != "" or "/" in name or "\\" in name


# -- files


def _files(name: str) -> list[Place] | None:
    """The stamps of all that a name may mean: in ComfyUI's folders, or as a path. A folder stands for what is in it."""
    plain, base = folder_paths.annotated_filepath(name)
    inside = os.path.relpath(os.path.join(os.sep, plain), os.sep) if plain else "."
    if inside == ".":
        return []
    folders = dict.fromkeys(path for kind in folder_paths.folder_names_and_paths for path in _folders(kind))
    folders |= dict.fromkeys([base or folder_paths.get_input_directory()])
    paths = [os.path.join(folder, inside) for folder in folders]
    if os.path.isabs(plain) or "/" in plain or "\\" in plain:
        paths.append(os.path.abspath(plain))
    if any(map(coming_file, paths)):
        return None  # which file it is shows only when it is whole
    found: list[Place] = []
    for path in dict.fromkeys(paths):
        stamp = _stamp(path)
        if stamp and os.path.isdir(path):
            within = list(_within(path, MAX_FILES))
            if len(within) > MAX_FILES:
                return None
            found.append([one for file in within if (one := _stamp(file, path))])
        elif stamp:  # an index stands for its parts
            top = os.path.dirname(path)
            found.append([one for file in files_of(path) if (one := _stamp(str(file), top))])
    return [place for place in found if place]


def _folders(kind: str) -> list[str]:
    return folder_paths.get_folder_paths(kind)


def _within(folder: str, most: int, suffixes: str | tuple[str, ...] = "") -> Iterator[str]:
    """Files below a folder, in a fixed order; one more than `most` at most."""
    count = 0
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in NO_FOLDERS and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(suffixes):
                yield os.path.join(path, name)
                count += 1
                if count > most:
                    return


def _stamp(path: str, top: str = "") -> Stamp | None:
    """The stamp of a file. top: the folder that was named, or that of the file that was."""
    try:
        state = os.stat(path)
        content = content_of(path, state)
    except (OSError, ValueError):
        return None
    inside = os.path.relpath(path, top) if top else ""
    return [state.st_size, state.st_mtime_ns, state.st_ino, state.st_ctime_ns, content, inside.replace(os.sep, "/")]


def portable(value: Any) -> Any:
    """What is there under a name, without what differs between machines: times, numbers, and how often it is there."""
    if not isinstance(value, list):
        return value
    places = [[[stamp[5], stamp[0], stamp[4]] for stamp in place] for place in value]
    return [place for number, place in enumerate(places) if place not in places[:number]]


# -- what texts name


def _embedding_names(text: str) -> set[str]:
    """What may be the name after each `embedding:` in a text; a weight, a bracket or a comma may follow it."""
    found = set()
    for match in re.finditer(rf"{EMBEDDING}(\S+)", text):
        name = match[1].replace("\\(", "(").replace("\\)", ")")
        found.update({name, match[1]})
        found.update(name[: cut.start()] for cut in re.finditer(r"[:,()\[\]]", name))
    return found - {""}


def _embeddings(name: str) -> list[Place]:
    """ComfyUI looks into every folder below those of embeddings, and takes the first that has such a file."""
    return _below("embeddings", name, EMBEDDING_SUFFIXES)


def _loras(name: str) -> list[Place]:
    return _below("loras", name, LORA_SUFFIXES)


def _wildcards(_: str) -> list[Place] | None:
    """All files of texts in the folders that packs share. Those in a pack's own folder are its data."""
    folders = [os.path.join(top, "wildcards") for top in (folder_paths.base_path, folder_paths.models_dir)]
    if "wildcards" in folder_paths.folder_names_and_paths:
        folders += _folders("wildcards")
    found = []
    for folder in dict.fromkeys(folders):
        files = list(_within(folder, MAX_SOURCES))
        if len(files) > MAX_SOURCES:
            return None
        found.append([stamp for file in files if (stamp := _stamp(file, folder))])
    return [place for place in found if place]


def _address(_: str) -> None:
    """What lies elsewhere may be another thing each time, and nobody can tell."""


def _below(kind: str, name: str, suffixes: tuple[str, ...]) -> list[Place]:
    found = []
    for top in _folders(kind):
        for folder, folders, _ in os.walk(top, followlinks=True):
            folders.sort()
            found += [[stamp] for end in suffixes if (stamp := _stamp(os.path.join(folder, name + end), folder))]
    return found


# -- source


def _source(name: str) -> Any:
    """A digest of the source of a node's pack, as it was when this process first used it, which is what runs.

    None where it was changed since this process began: what runs is then in no file any more.
    """
    kind = nodes.NODE_CLASS_MAPPINGS.get(name)
    if kind is None:
        return []
    if kind not in _sources:
        path, pack = _file_of(kind), _pack_of(kind)
        if path is None:
            _sources[kind] = []
        elif pack is None:  # ComfyUI's own: `comfyui_digest` is part of every name
            _sources[kind] = _digest(os.path.dirname(path), [path])
        else:  # a node imports helpers of its pack
            _sources[kind] = _digest(pack, list(_within(pack, MAX_SOURCES, CODE)))
    return _sources[kind]


def _data(name: str) -> Any:
    """A digest of what else lies in the folder of a node's pack: styles, tables, fonts, wildcards.

    A node may have read it when it was imported, or read it anew each time. So it is looked at each time, and is None
    where anything was changed since this process began.
    """
    kind = nodes.NODE_CLASS_MAPPINGS.get(name)
    pack = _pack_of(kind) if kind is not None and not is_ours(kind) else None
    if pack is None:
        return []
    files = list(_within(pack, MAX_SOURCES))
    if len(files) > MAX_SOURCES:
        return None
    # What the system leaves in a folder that somebody looks at (.DS_Store) is no data, nor is a link to nowhere.
    data = [file for file in files if not file.endswith(NO_DATA) and not os.path.basename(file).startswith(".")]
    return _digest(pack, [file for file in data if os.path.exists(file)])


def _file_of(kind: type) -> str | None:
    """The file that a class of nodes is in; None for one that was made by something that is no file."""
    try:
        return inspect.getsourcefile(kind)
    except TypeError:
        return None


def _pack_of(kind: type) -> str | None:
    """The folder of the custom nodes that a class belongs to; None for ComfyUI's own, and for a pack of one file."""
    path = _file_of(kind)
    for folder in _folders("custom_nodes") if path is not None else ():
        inside = os.path.relpath(path, folder)
        if not inside.startswith(os.pardir) and os.sep in inside:
            return os.path.join(folder, inside.split(os.sep)[0])
    return None


@functools.cache
def comfyui_digest() -> str | None:
    """Hash ComfyUI's code, which changes with each pull where its version does not. None where it just changed.

    The tables that lie beside it, as those of tokenizers, count too.
    """
    root = os.path.dirname(os.path.abspath(nodes.__file__))
    paths = [entry.path for entry in os.scandir(root) if entry.name.endswith(".py")]
    for entry in os.scandir(root):
        if entry.is_dir() and entry.name.startswith("comfy"):
            # A folder of the user's own may be called so too, and what lies in it is no part of ComfyUI.
            paths += _within(entry.path, MAX_SOURCES, "" if entry.name in sys.modules else CODE)
    return _digest(root, sorted(paths))


@functools.cache
def own_digest() -> str | None:
    """Hash the code of Spillway, which is in what ComfyUI's own nodes make too. None where it just changed."""
    root = str(Path(__file__).parents[2])
    paths = [os.path.join(root, "__init__.py")]
    for name in ("cache", "nodes", "ops", "patcher"):
        paths += _within(os.path.join(root, name), MAX_SOURCES, CODE)
    return _digest(root, sorted(paths))


def _digest(folder: str, paths: list[str]) -> str | None:
    digest = hashlib.sha256()
    for path in paths:
        stamp = _stamp(path)
        if stamp is None or stamp[3] > STARTED or stamp[1] > STARTED or len(paths) > MAX_SOURCES:
            return None
        digest.update(f"{os.path.relpath(path, folder)}\0{stamp[4]}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


LOOKS: dict[str, Callable[[str], Any]] = {
    "file": _files,
    "embedding": _embeddings,
    "lora": _loras,
    "wildcards": _wildcards,
    "address": _address,
    "source": _source,
    "data": _data,
}
