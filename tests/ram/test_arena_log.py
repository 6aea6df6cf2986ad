"""The C library's figures in the debug log, and systems that have none."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys

import pytest

from kit.skips import skip_loudly
from spillway.cache.output_cache import OutputCache
from spillway.cache.snapshot import MemorySnapshot
from spillway.ops.ram import allocator, arena_log
from spillway.ops.ram.arena_log import arenas_logged

MIB = 1 << 20


# What allocator.py asks of a glibc before 2.33, which has no mallinfo2.
OLD_GLIBC = """
const char *gnu_get_libc_version(void) { return "2.31"; }
int mallopt(int name, int value) { return 1; }
int malloc_trim(unsigned long kept) { return 0; }
"""


@pytest.fixture(scope="module")
def old_glibc(tmp_path_factory):
    """A real library whose symbols are those of an old glibc: ctypes finds what it has, and no mallinfo2."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        skip_loudly("the figures of an old glibc: no C compiler, or not Linux")
    folder = tmp_path_factory.mktemp("glibc")
    (folder / "old.c").write_text(OLD_GLIBC)
    subprocess.run([compiler, "-shared", "-fPIC", "-nostdlib", "-o", folder / "old.so", folder / "old.c"], check=True)
    return folder / "old.so"


@pytest.fixture(params=["no mallinfo2", "no glibc"])
def without_figures(request, monkeypatch):
    library = None if request.param == "no glibc" else ctypes.CDLL(str(request.getfixturevalue("old_glibc")))
    monkeypatch.setattr(allocator, "_libc", lambda: library)


def test_without_mallinfo2_there_are_no_figures_and_no_error(without_figures, caplog):
    assert allocator.arenas() == {} and MemorySnapshot.take().arena_free == 0
    assert not allocator.trim()
    with caplog.at_level(logging.DEBUG, logger="spillway"), arenas_logged("loading"):
        pass
    assert "loading: the C library gives no figures of its arenas" in caplog.text


def test_the_allocator_is_tuned_and_the_cache_works_without_mallinfo2(old_glibc, monkeypatch, caplog):
    library = ctypes.CDLL(str(old_glibc))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    for name in allocator.USERS_OWN:
        monkeypatch.delenv(name, raising=False)
    allocator._libc.cache_clear()
    monkeypatch.setattr(allocator, "tuned", False)
    monkeypatch.setattr(allocator, "done", None)
    try:
        assert allocator.tune().startswith("mmap threshold fixed at 4 MiB")
        engine = OutputCache(1 << 62)
        engine.put("a", 1, bytearray(10))
        with caplog.at_level(logging.DEBUG, logger="spillway"):
            engine.evict(1 << 40)
        assert "evicting 1 outputs: the C library gives no figures" in caplog.text
    finally:
        allocator._libc.cache_clear()


@pytest.mark.skipif(sys.platform != "linux" or not allocator.arenas(), reason="no glibc with mallinfo2")
def test_what_a_block_takes_is_in_the_debug_log(caplog):
    with caplog.at_level(logging.DEBUG, logger="spillway"), arenas_logged("loading a model"):
        held = [bytearray(20_000) for _ in range(500)]
    assert len(held) == 500
    assert "loading a model: allocator's arenas " in caplog.text and ", used " in caplog.text and "(+" in caplog.text


def test_evictions_are_logged_and_nothing_is_asked_without_that_level(caplog, monkeypatch):
    asked = []
    monkeypatch.setattr(arena_log, "arenas", lambda: asked.append(1) or {})
    for level, times in ((logging.INFO, 0), (logging.DEBUG, 2)):
        engine = OutputCache(1 << 62)
        engine.put("a", 1, bytearray(10))
        with caplog.at_level(level, logger="spillway"):
            engine.evict(1 << 40)
        assert len(asked) == times
    assert "evicting 1 outputs: " in caplog.text


def test_an_error_inside_goes_on(caplog):
    with caplog.at_level(logging.DEBUG, logger="spillway"), pytest.raises(KeyError), arenas_logged("x"):
        raise KeyError
    assert "x: " in caplog.text
