"""Writes one large entry into a shared store, and is killed while it does: write_shared_store.py FOLDER NAME"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from kit import pack  # noqa: F401 - imports the pack as `spillway`
from spillway.cache.disk_format import describe
from spillway.cache.store import place
from spillway.cache.store.shared_store import Options, SharedStore
from spillway.ops.ledger import Ledger

folder, name = sys.argv[1:]
write = place._Whole.write


def slowly(self, data):
    time.sleep(0.05)
    return write(self, data)


place._Whole.write = slowly
store = SharedStore(Options(f"file://{folder}"), Ledger("shared store"))
found = describe([[torch.ones(256 << 20, dtype=torch.uint8)]])
print("writing", flush=True)
store.store(name, found, seconds=20.0, kind="Node", stamps=None, stop=lambda: False)
