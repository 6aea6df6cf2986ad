"""What stays is allocated apart from what comes and goes, in the heap of a thread of its own."""

import json
import os
import signal
import threading
import time

import pytest
import torch

from kit.own_process import in_own_process
from spillway.ops.ram import allocator
from spillway.ops.ram.apart import apart, memory_apart

# Layers that compute in blocks of 4 MB, and at each a small tensor that stays.
LAYERS = """
import sys
import kit.pack
import torch
from spillway.ops.ram import allocator
from spillway.ops.ram.apart import apart

allocator.tune()
allocator.begin_computing()
make = apart if sys.argv[1] == "apart" else (lambda call: call())
stays, before = [], allocator.arenas()["arenas"]
for layer in range(40):
    hidden = torch.empty(4 << 20, dtype=torch.uint8)
    for _ in range(4):
        inner = torch.empty(4 << 20, dtype=torch.uint8)
        stays += [make(lambda: torch.empty(64, dtype=torch.uint8)) for _ in range(4)]
        hidden = torch.empty(4 << 20, dtype=torch.uint8)
del hidden, inner
print(allocator.arenas()["arenas"] - before)
"""

glibc = pytest.mark.skipif(not allocator.has_heaps(), reason="only glibc gives each thread a heap of its own")


def growth(how):
    return int(in_own_process(LAYERS, how))


@glibc
def test_layers_that_compute_while_weights_come_to_stay_use_the_same_memory():
    apart, beside = growth("apart"), growth("beside")
    assert beside > 1e9, "nothing would be won by a heap of its own"
    assert apart < beside / 8, "what was computed in is not lent to the next layer"


def test_tensors_are_ordinary_whatever_the_caller_is_in():
    with torch.inference_mode():
        made = apart(lambda: torch.empty(8))
    assert not made.is_inference() and not made.requires_grad
    source = torch.zeros(8, requires_grad=True)
    assert apart(lambda: source[:4]).grad_fn is None and torch.is_grad_enabled()


@glibc
def test_another_thread_allocates_and_its_errors_are_the_callers():
    assert apart(threading.get_ident) != threading.get_ident()
    with pytest.raises(RuntimeError, match="planted"):
        apart(fail)


# What blocks that are held and then freed add to the memory of the process.
BLOCKS = """
import json
from pathlib import Path
import kit.pack
from spillway.ops.ram.apart import memory_apart

def private_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

memory_apart(3 << 20).fill_(1)
before, blocks = private_bytes(), []
for nbytes in (3 << 20, 200 << 10) * 16:
    blocks.append(memory_apart(nbytes).fill_(1))
held = private_bytes() - before
del blocks
print(json.dumps([held, private_bytes() - before]))
"""


@glibc
def test_large_blocks_go_back_as_they_are_freed():
    held, kept = json.loads(in_own_process(BLOCKS))
    assert held > 45e6 and kept < 2e6


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 1 << 20])
def test_memory_of_any_size_is_writable(nbytes):
    memory = memory_apart(nbytes)
    assert memory.shape == (nbytes,) and memory.dtype == torch.uint8
    memory.fill_(7)
    assert memory.untyped_storage().nbytes() == nbytes, "a storage of its own"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_a_thread_of_its_own():
    apart(threading.get_ident)
    child = os.fork()
    if not child:
        os._exit(apart(torch.empty(8).numel) - 8)  # without a thread it would wait for ever
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def fail():
    raise RuntimeError("planted")
