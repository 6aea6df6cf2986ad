"""Says what is in many model files: a table with what each is, which are there twice, and which do not load."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .files.probe import Probe
from .files.safetensors_header import PICKLES, SourceError, is_pickle
from .ledger import in_words
from .parts.index import files_of, index_of, is_index, part_words
from .parts.probe import probe
from .pickles.probe import probe as probe_pickle

SUFFIXES = (".safetensors", ".sft", ".gguf", *PICKLES)
# A folder of more files is scanned as far as this.
MAX_FILES = 20_000
# Parts of a file by which two files of one size are told apart. No tensor is read as a whole.
FIRST, SAMPLES, SAMPLE = 64 << 10, 16, 4 << 10
LONGEST_NOTE = 160
COLUMNS = ("File", "Kind", "Format", "Size", "Note")


@dataclass
class Scanned:
    """What is known of a file, or of an index with its parts. note: what is wrong with it, or to be done."""

    name: str
    path: Path
    nbytes: int
    kind: str = ""
    architecture: str = ""
    formats: str = ""
    note: str = ""
    loads: bool = True
    content: str = ""
    twin: str = ""  # the name of an earlier file with the same content

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the columns of the table."""
        kind = ", ".join(part for part in (self.kind, self.architecture) if part)
        note = "; ".join(part for part in (f"the same as {self.twin}" if self.twin else "", self.note) if part)
        return tuple(map(_on_a_line, (self.name, kind or "-", self.formats or "-", in_words(self.nbytes), note)))


def _on_a_line(text: str) -> str:
    """Write what would break a line, or cannot be shown, as Python does. Files may have any name."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def is_model_file(name: str) -> bool:
    """Say whether a file is one that may hold a model, by its name."""
    return name.lower().endswith(SUFFIXES) or is_index(name) or is_pickle(name)


def scan(
    files: Sequence[tuple[str, Path]], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Scanned]:
    """Look at (name, path) of files. Parts whose index lies beside them are looked at with it.

    progress: called with (files done, all). An error that it raises ends the scan.
    """
    files = [(name, path) for name, path in files[:MAX_FILES] if index_of(path) is None]
    found: list[Scanned] = []
    known: dict[str, Scanned] = {}
    for done, (name, path) in enumerate(files):
        progress(done, len(files))
        one = _look(name, path)
        found.append(one)
        first = known.setdefault(one.content, one) if one.content else one
        if first is not one:
            one.twin = first.name
    progress(len(files), len(files))
    return found


def _look(name: str, path: Path) -> Scanned:
    try:
        one = Scanned(name, path, sum(file.stat().st_size for file in files_of(path)))
        one.content = _content(path)
        _describe(one)
    except (SourceError, OSError) as error:
        one = Scanned(name, path, path.stat().st_size if path.is_file() else 0, loads=False)
        one.note = f"does not load: {_shortened(str(error), path)}"
    return one


def _describe(one: Scanned) -> None:
    pickle = is_pickle(one.path)
    result = probe_pickle(one.path) if pickle else probe(one.path)
    one.kind, one.architecture, one.formats = result.kind, result.architecture, _formats(result)
    if result.files > 1:
        one.note = f"in {result.files} files"
    if pickle:
        several = f" in {result.files} files" if result.files > 1 else ""
        one.note = f"a pickle{several}: convert it to safetensors"
    if part_words(one.path):
        one.loads, one.note = False, part_words(one.path)


def _formats(result: Probe) -> str:
    """Name the formats that most bytes are in, two at most."""
    if result.quantisation:
        return ", ".join(list(result.quantisation)[:2])
    by_bytes = sorted(result.dtypes, key=lambda name: -result.dtypes[name][1])
    return ", ".join(by_bytes[:2])


def _content(path: Path) -> str:
    """Hash the sizes of a model's files, the beginning of each and samples of the rest."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files_of(path):
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        if not size:
            continue
        with open(file, "rb", buffering=0) as opened:
            digest.update(opened.read(FIRST))
            for place in range(SAMPLES):
                opened.seek(size * place // SAMPLES)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def _shortened(text: str, path: Path) -> str:
    """Leave out the folder, which the table's first column says, and the end of a long reason."""
    text = text.replace(f"{path}: ", "").replace(f"{path.parent}{os.sep}", "").replace("\n", " ")
    return text if len(text) <= LONGEST_NOTE else f"{text[:LONGEST_NOTE]}…"


def as_text(found: Sequence[Scanned]) -> str:
    """Return a table for a person: what is wrong first, then all files."""
    twins, broken = [one for one in found if one.twin], [one for one in found if not one.loads]
    pickles = [one for one in found if one.note.startswith("a pickle")]
    lines = [f"{len(found):,} models, {in_words(sum(one.nbytes for one in found))}"]
    if twins:
        lines.append(f"{len(twins):,} there twice, {in_words(sum(one.nbytes for one in twins))}")
    if broken:
        lines.append(f"{len(broken):,} that do not load")
    if pickles:
        lines.append(f"{len(pickles):,} pickles, which must be converted")
    rows = [COLUMNS, *(one.cells for one in sorted(found, key=lambda one: (one.loads and not one.twin, one.name)))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append(" | ".join((*cells, row[-1])).rstrip())
    return "\n".join((", ".join(lines[: len(lines) - len(rows)]), "", *lines[len(lines) - len(rows) :]))
