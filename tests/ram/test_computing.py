"""While a CPU computes step after step, the blocks that it computes in are used again, and go back afterwards."""

import json
import sys

import pytest

from kit.own_process import in_own_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the tuned allocator is glibc's")

# Steps that ask for the same blocks each time, as a model's layers do, in a process that imports no torch.
SCRIPT = """
import ctypes, json, resource, runpy, sys
runpy.run_path("prestartup_script.py")
allocator = sys.modules["spillway_allocator"]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    for _ in range(4):
        blocks = [libc.malloc(nbytes << 20) for nbytes in (6, 20, 9)]
        for block, nbytes in zip(blocks, (6, 20, 9)):
            libc.memset(block, 1, nbytes << 20)
        for block in reversed(blocks):
            libc.free(block)

def faults_of(steps):
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def private():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

before = private()
found = {"tuned": allocator.tuned, "idle": faults_of(3)}
allocator.begin_computing()
found["computing"] = faults_of(3)
allocator.end_computing()
found["kept"] = private() - before
found["idle again"] = faults_of(3)
print(json.dumps(found))
"""
PAGES = 3 * 4 * (35 << 20) // 4096  # that three steps write into


@pytest.fixture(scope="module")
def found():
    found = json.loads(in_own_process(SCRIPT).splitlines()[-1])
    if not found["tuned"]:
        pytest.skip("this C library's allocator cannot be tuned, or somebody else does so")
    return found


def test_a_step_takes_no_fresh_pages_for_what_the_step_before_gave_back(found):
    assert found["computing"] < PAGES // 20


@pytest.mark.parametrize("when", ["idle", "idle again"])
def test_elsewhere_large_blocks_go_back_to_the_system_at_once(found, when):
    assert found[when] > PAGES // 2


def test_nothing_is_kept_when_the_computation_has_ended(found):
    assert found["kept"] < 4 << 20
