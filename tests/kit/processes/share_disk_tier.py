"""Writes, evicts and reads entries in a folder that other processes use too: FOLDER, MY NUMBER, SECONDS."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from kit import pack  # noqa: F401 - makes the pack importable
from spillway.cache.disk_tier import DiskTier
from spillway.ops.ledger import Ledger

MIB = 1 << 20
NAMES = 8
CAP = 6 * MIB


def take_turns(folder, writer, seconds, others=lambda: True):
    """Write and read in turns; count the entries of the other process that were found. others: whether it lives."""
    tier = DiskTier(Path(folder), CAP, 0.0, Ledger("shared"))
    found = 0
    end = time.monotonic() + seconds
    turn = writer * 3
    while time.monotonic() < end and (found < 20 or seconds > 20):
        assert others()
        turn += 1
        name = turn % NAMES
        outputs = [[torch.full((MIB,), name, dtype=torch.uint8), writer, name]]
        # Each process has stamps of its own, so that it writes over what the other one wrote.
        assert tier.store(str(name), outputs, seconds=1.0, kind="Node", stamps=writer)
        name = (turn * 5 + 1) % NAMES
        loaded = tier.load(str(name), lambda stamps: stamps in (0, 1))
        if loaded is not None:
            ((data, by, number),), _, stamps = loaded
            assert bool((data == name).all()) and number == name and by == stamps
            found += by != writer
    assert all("wrote" in text for text in tier.ledger.decisions), "nothing is damaged, and nothing fails"
    return found


if __name__ == "__main__":
    take_turns(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
