"""Evicted outputs on disk: plain tensors in containers, as safetensors beside JSON, found again after a restart.

Never pickle. An entry is a pair of files; it exists when its JSON does, and counts only when its hash is right.
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
# Left free on the disk for others.
KEEP_FREE = 1 << 30
# After as many failures in a row it stops writing until the next start.
PATIENCE = 3
LITERALS = (type(None), bool, int, float, str)


class NotPlain(TypeError):
    """An output that holds something other than tensors, containers and literals."""


class DiskTier:
    """A folder of evicted outputs under a cap in bytes. Whatever goes wrong with it is said once and never raised.

    least_seconds: what took less to make is not worth a file. room: bytes of RAM that writing may take.
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
        """Write outputs under a name; whether they are there now. stamps: plain data, for `load` to judge by."""
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
        except (NotPlain, RecursionError):
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
        """Delete what was not used for longest until `nbytes` more stay under the cap."""
        entries = sorted(self._entries(), key=lambda entry: entry[1])
        held = sum(size for _, _, size in entries)
        for name, _, size in entries:
            if held + nbytes <= self.cap:
                break
            self._discard(name)
            held -= size

    def _entries(self) -> list[tuple[str, float, int]]:
        """(name, last use, bytes) of all that is there, halves of entries and leftovers too."""
        found: dict[str, list[float]] = {}
        for path in self.folder.glob("*"):
            if path.suffix in (".safetensors", ".json", ".part"):
                state = path.stat()
                seen = found.setdefault(path.stem, [0.0, 0])
                seen[0], seen[1] = max(seen[0], state.st_mtime), seen[1] + state.st_size
        return [(name, used, int(size)) for name, (used, size) in found.items()]

    # -- reading

    def load(self, name: str, holds: Callable[[Any], bool] = lambda _: True) -> tuple[Any, float, Any] | None:
        """(outputs, seconds they took to make, stamps), or None.

        holds: whether the stamps still do. What is damaged or no longer holds is deleted.
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
            found = _rebuild(record["tree"], load_file(data)), float(record["seconds"]), record["stamps"]
        except Exception as error:  # damaged in whatever way: it is made again
            self.ledger.decide(f"disk tier: {about.name} is damaged ({error}): ignored")
            self._discard(name)
            return None
        for path in (data, about):
            try:
                os.utime(path)
            except OSError:  # a read-only folder can still be read
                break
        return found

    def _record(self, name: str) -> dict[str, Any]:
        """The JSON of an entry. Raises OSError, or ValueError for one that is not as it was written."""
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
            with contextlib.suppress(OSError):  # a read-only folder: it stays, and stays ignored
                path.unlink(missing_ok=True)

    def _paths(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"


def name_of(key: Hashable, salt: Any) -> str | None:
    """A file name for a key that is the same in every process; None for keys that cannot be told again.

    salt: plain data that must be the same too (versions, stamps of files).
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
    """Plain data that stands for the outputs; their tensors go into `tensors`."""
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
    raise NotPlain


def _writable(value: torch.Tensor, storages: set[int]) -> torch.Tensor:
    """The tensor as a file takes it: contiguous, and sharing its memory with no other of the same file."""
    if value.layout is not torch.strided or value.is_meta or value.requires_grad or value.is_quantized:
        raise NotPlain
    plain = value.detach().cpu().contiguous()
    if plain.untyped_storage().data_ptr() in storages:
        plain = plain.clone()
    storages.add(plain.untyped_storage().data_ptr())
    return plain


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
