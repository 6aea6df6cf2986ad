"""Keeps evicted outputs on disk: ordinary tensors in containers, as safetensors beside JSON.

Nothing is pickled. An entry is a pair of files, which a later process finds again by name. It exists when its JSON
exists, and counts only when its hashes are right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..ops.ledger import Ledger, in_words

FORMAT = 2
MAX_JSON_BYTES = 16 << 20
# Bytes that stay free on the disk for other programs.
KEEP_FREE = 1 << 30
# Failures in a row after which nothing is written any more until the next start.
PATIENCE = 3
LITERALS = (type(None), bool, int, float, str)


class NotStorable(TypeError):
    """Raised for an output that holds something other than ordinary tensors, containers and literals."""


class DiskTier:
    """A folder of evicted outputs under a cap in bytes. A failure is logged once and never raised.

    least_seconds: outputs that took less to make are not worth a file. room: tells how much RAM writing may take.
    """

    def __init__(
        self,
        folder: Path,
        cap: int,
        least_seconds: float,
        ledger: Ledger,
        room: Callable[[], int] = lambda: 1 << 62,
    ) -> None:
        self.folder = folder
        self.cap = cap
        self.least_seconds = least_seconds
        self.ledger = ledger
        self.room = room
        self._failures = 0

    # -- writing

    def store(self, name: str, outputs: Any, *, seconds: float, kind: str, stamps: Any = None) -> bool:
        """Write outputs under a name. Returns whether they are there now. stamps: JSON data, for `load` to judge by."""
        if self._failures >= PATIENCE or seconds < self.least_seconds:
            return False
        try:
            if self._record(name)["stamps"] == stamps:
                return True
        except Exception:  # there is none, or it is damaged
            pass
        try:
            tensors: dict[str, torch.Tensor] = {}
            tree = _describe(outputs, tensors, {}, set())
        except (NotStorable, RecursionError):
            return False
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        try:
            return self._write(name, tree, tensors, nbytes, {"kind": kind, "seconds": seconds, "stamps": stamps})
        except Exception as error:
            self._failures += 1
            self._discard(name)
            self.ledger.decide_once(f"disk tier: {self.folder} cannot be written ({error}): outputs are lost instead.")
            return False

    def _write(
        self, name: str, tree: Any, tensors: dict[str, torch.Tensor], nbytes: int, what: Mapping[str, Any]
    ) -> bool:
        if nbytes > min(self.cap, self.room()):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(nbytes)
        free = shutil.disk_usage(self.folder).free
        if free < nbytes + KEEP_FREE:
            self.ledger.decide_once(f"disk tier: only {in_words(free)} are free on the disk; nothing more is written.")
            return False
        data, about = self._paths(name)
        partial = data.with_suffix(".part")
        save_file(tensors, partial)
        record = {"format": FORMAT, **what, "tree": tree, "data": _hash_file(partial)}
        os.replace(partial, data)
        text = json.dumps({**record, "check": _check(record)})
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, about)
        self._failures = 0
        self.ledger.decide(
            f"disk tier: wrote {what['kind']}, {in_words(nbytes)}, which took {what['seconds']:.1f} s to make"
        )
        return True

    def _make_room(self, nbytes: int) -> None:
        """Delete the entries that were not used for longest, until `nbytes` more stay under the cap."""
        entries = sorted(self._entries(), key=lambda entry: entry[1])
        held = sum(size for _, _, size in entries)
        for name, _, size in entries:
            if held + nbytes <= self.cap:
                break
            self._discard(name)
            held -= size

    def _entries(self) -> list[tuple[str, float, int]]:
        """List (name, last use, bytes) of all entries in the folder, with halves of entries and leftovers."""
        states: dict[str, list[float]] = {}
        for path in self.folder.glob("*"):
            if path.suffix in (".safetensors", ".json", ".part"):
                state = path.stat()
                entry = states.setdefault(path.stem, [0.0, 0])
                entry[0], entry[1] = max(entry[0], state.st_mtime), entry[1] + state.st_size
        return [(name, used, int(size)) for name, (used, size) in states.items()]

    # -- reading

    def load(self, name: str, holds: Callable[[Any], bool] = lambda _: True) -> tuple[Any, float, Any] | None:
        """Read (outputs, seconds they took to make, stamps). Returns None where there are none.

        holds: says whether stamps still hold. Damaged entries, and those whose stamps do not hold, are deleted.
        """
        data, about = self._paths(name)
        if not about.is_file():
            return None
        try:
            record = self._record(name)
            if not holds(record["stamps"]):
                self.ledger.decide(f"disk tier: what {record['kind']} was made from has changed: it is made again")
                self._discard(name)
                return None
            if _hash_file(data) != record["data"]:
                raise ValueError("its tensors were changed")
            entry = _rebuild(record["tree"], load_file(data)), float(record["seconds"]), record["stamps"]
        except Exception as error:  # however it is damaged, the node makes it again
            self.ledger.decide(f"disk tier: {about.name} is damaged ({error}): ignored")
            self._discard(name)
            return None
        for path in (data, about):
            try:
                os.utime(path)
            except OSError:  # a read-only folder keeps no time of use, and can still be read
                break
        return entry

    def _record(self, name: str) -> dict[str, Any]:
        """Read the JSON of an entry. Raises OSError, or ValueError for one that is not as it was written."""
        about = self._paths(name)[1]
        if about.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("its JSON is too large")
        record = json.loads(about.read_text(encoding="utf-8"))
        if record.pop("check") != _check(record) or record["format"] != FORMAT:
            raise ValueError("its JSON was changed")
        return record  # type: ignore[no-any-return]

    def _discard(self, name: str) -> None:
        data, about = self._paths(name)
        for path in (about, data, data.with_suffix(".part")):
            with contextlib.suppress(OSError):  # in a read-only folder it stays, and is ignored again
                path.unlink(missing_ok=True)

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"


def name_of(key: Hashable, salt: Any) -> str | None:
    """Return a file name for a key, the same in every process. None for keys that another process cannot make.

    salt: JSON data that must be the same too, such as versions and stamps of files.
    """
    try:
        text = json.dumps([_canonical(key), salt], sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return [type(value).__name__, value]
    if isinstance(value, tuple | list):
        return ["sequence", [_canonical(item) for item in value]]
    if isinstance(value, frozenset):
        return ["set", sorted((_canonical(item) for item in value), key=json.dumps)]
    raise TypeError(f"a {type(value).__name__} in a key")


def _describe(value: Any, tensors: dict[str, torch.Tensor], names: dict[int, str], storages: set[int]) -> Any:
    """Return JSON data that stands for the outputs. Their tensors go into `tensors`."""
    if type(value) is torch.Tensor:
        if id(value) not in names:
            names[id(value)] = name = str(len(tensors))
            tensors[name] = _writable(value, storages)
        return {"tensor": names[id(value)], "device": str(value.device)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_describe(item, tensors, names, storages) for item in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": [[key, _describe(item, tensors, names, storages)] for key, item in value.items()]}
    if type(value) in LITERALS:
        return {"literal": value}
    raise NotStorable


def _writable(value: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """Make a tensor ready for a file: contiguous, and sharing its memory with no other tensor of that file."""
    if value.layout is not torch.strided or value.is_meta or value.requires_grad or value.is_quantized:
        raise NotStorable
    tensor = value.detach().cpu().contiguous()
    if tensor.untyped_storage().data_ptr() in storages:
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor


def _rebuild(node: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]].to(node["device"])
    if "list" in node:
        return [_rebuild(item, tensors) for item in node["list"]]
    if "tuple" in node:
        return tuple(_rebuild(item, tensors) for item in node["tuple"])
    if "dict" in node:
        return {key: _rebuild(item, tensors) for key, item in node["dict"]}
    return node["literal"]


def _check(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=32).hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
