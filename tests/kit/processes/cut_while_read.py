"""Cut a mapped file short where nothing checks it before it is read. Print what came of it as JSON.

cut_while_read.py FILE HOW
"""

import json
import mmap
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from spillway.ops.files.disk_map import DiskMap, SourceError
from spillway.ops.files.lost_pages import lost_so_far, raise_since


def said(call):
    try:
        return str(call())
    except SourceError as error:
        return f"{type(error).__name__} {error}"


path, how = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(4)
if how == "sent":
    DiskMap(path)  # the handler stands
    os.kill(os.getpid(), signal.SIGBUS)
if how == "of others":
    with open(path, "rb") as file:
        theirs = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    DiskMap(path)  # the handler stands
    os.truncate(path, 4096)
    theirs[-1]
disk_map, other = DiskMap(path), DiskMap(sys.argv[3])
weight = disk_map.tensor("weight")
before = lost_so_far()
os.truncate(path, 4096)
if how == "in a thread":
    thread = threading.Thread(target=weight.sum)
    thread.start()
    thread.join()
elif how == "many threads":  # of torch's own, which know nothing of Python
    torch.nn.functional.linear(torch.ones(4, weight.shape[1]), weight)
elif how == "held by Python":
    bytes(memoryview(weight.numpy()).cast("B"))
else:
    weight.sum()
print(
    json.dumps(
        {
            "lost": lost_so_far() - before,
            "since": said(lambda: raise_since(before)),
            "check": said(disk_map.check),
            "the other": [said(other.check), float(other.tensor("weight").sum())],
            "nothing since": said(lambda: raise_since(lost_so_far())),
        }
    )
)
