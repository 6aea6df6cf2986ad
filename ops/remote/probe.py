"""Tells what is in a file that lies elsewhere. Only its header is brought. Needs no torch."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from ..files.coming_file import ComingFile, forget, register
from ..files.probe import Probe
from ..files.safetensors_header import SourceError
from ..parts.index import is_index
from ..parts.probe import probe
from .download import PAUSES
from .fetch import patiently
from .open_store import open_store
from .store import Refused, State, Store, file_name


def probe_address(address: str) -> Probe:
    """Tell what the file at an address holds. Raises SourceError for one that is none, or that cannot be had."""
    store = open_store(address)
    if is_index(file_name(address)):
        raise Refused(f"{store.address}: an index is probed with its parts beside it. Give the address of one part.")
    state = patiently(store.state, store.address, PAUSES)
    with tempfile.TemporaryDirectory(prefix="spillway-") as folder:
        path = Path(folder) / (file_name(address) or "model.safetensors")
        data = path.with_name("data")
        with open(data, "wb") as file:
            file.truncate(state.nbytes)
        coming = ComingFile(path, data, state.nbytes)
        coming.bring = lambda: _bring(coming, store, state)
        register(coming)
        try:
            found = probe(path)
        except SourceError as error:
            raise type(error)(str(error).replace(str(path), store.address)) from None
        finally:
            forget(coming)
    found.path = store.address
    return found


def _bring(coming: ComingFile, store: Store, state: State) -> None:
    """Bring what is asked for, and nothing else."""
    for offset, nbytes in coming.asked:
        blocks = coming.blocks(offset, nbytes)
        missing = [block for block in blocks if not coming.come[block]]
        if not missing:
            continue
        run = range(missing[0], missing[-1] + 1)
        start = run.start * coming.block_bytes
        nbytes = min(run.stop * coming.block_bytes, coming.file_bytes) - start
        part = patiently(partial(store.read, start, nbytes, state), store.address, PAUSES)
        with open(coming.data, "r+b") as file:
            file.seek(start)
            file.write(part)
        coming.note_come(run)
