"""Several processes in one folder, and those that were killed there."""

import os
import subprocess
import sys
import time

import torch

from kit.pack import ROOT
from kit.processes.share_disk_tier import CAP, take_turns
from spillway.cache.disk_tier import DiskTier
from spillway.ops.files.partial_file import PartialFile, sweep
from spillway.ops.ledger import Ledger

MIB = 1 << 20


def size_of(path):
    """Its bytes; none where the other process has just evicted it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_two_processes_and_one_of_them_is_killed(tmp_path):
    """They write, evict and read in one folder. What the killed one was writing is nobody's, and is removed."""
    command = [sys.executable, "tests/kit/processes/share_disk_tier.py", str(tmp_path), "1", "60"]
    other = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    try:
        while not list(tmp_path.glob("*.output")) and time.monotonic() < end:
            time.sleep(0.01)
        assert take_turns(tmp_path, 0, 20, lambda: other.poll() is None) >= 20
        assert sum(map(size_of, tmp_path.iterdir())) <= CAP + 2 * (MIB + 1024)
        while not list(tmp_path.glob("*.partial")) and time.monotonic() < end:
            pass
    finally:
        other.kill()
        error = other.communicate()[1]
    assert error == "", error
    (tmp_path / ".spillway-0123456789abcdef.partial").write_bytes(bytes(MIB))  # the kill may have come too late
    tier = DiskTier(tmp_path, 100 * MIB, 0.0, Ledger("later"))
    left = {path.name for path in tmp_path.glob("*.partial")}
    assert left <= {os.path.basename(path) for path, *_ in tier._files()}, "it counts"
    for path in tmp_path.glob("*.output"):
        assert tier.load(path.stem) is not None, "no half file has its final name"
    assert {path.name for path in sweep(tmp_path)} == left and not list(tmp_path.glob("*.partial"))


def test_the_file_of_a_living_process_stays_and_counts(tmp_path):
    tier = DiskTier(tmp_path, 10 * MIB, 0.0, Ledger("test"))
    assert tier.store("old", [[torch.zeros(4 * MIB, dtype=torch.uint8)]], seconds=1.0, kind="Node")
    theirs = PartialFile(tier.path("theirs"), overwrite=True)
    theirs.file.truncate(5 * MIB)
    try:
        assert tier.store("new", [[torch.zeros(2 * MIB, dtype=torch.uint8)]], seconds=1.0, kind="Node")
        assert tier.load("old") is None and tier.load("new") is not None, "it would have been above the cap"
        assert sweep(tmp_path) == [] and theirs.path.exists()
    finally:
        theirs.discard()


def test_files_that_are_not_ours_stay_and_do_not_count(tmp_path):
    other = tmp_path / "notes.txt"
    other.write_bytes(bytes(8 * MIB))
    tier = DiskTier(tmp_path, 6 * MIB, 0.0, Ledger("test"))
    for name in "abc":
        assert tier.store(name, [[torch.zeros(4 * MIB, dtype=torch.uint8)]], seconds=1.0, kind="Node")
    assert other.exists() and [path.name for path in tmp_path.glob("*.output")] == ["c.output"]
