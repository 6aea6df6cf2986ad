"""The C library's figures in the debug log, and systems that have none."""

import logging
import sys

import pytest

from spillway.cache.output_cache import OutputCache
from spillway.cache.snapshot import MemorySnapshot
from spillway.ops.ram import allocator, arena_log
from spillway.ops.ram.arena_log import arenas_logged

MIB = 1 << 20


class OldLibrary:
    """A glibc before 2.33, which has no mallinfo2."""

    def malloc_trim(self, _):
        return 0


@pytest.fixture(params=["no mallinfo2", "no glibc"])
def without_figures(request, monkeypatch):
    monkeypatch.setattr(allocator, "_libc", lambda: OldLibrary() if request.param == "no mallinfo2" else None)


def test_without_mallinfo2_there_are_no_figures_and_no_error(without_figures, caplog):
    assert allocator.arenas() == {} and MemorySnapshot.take().arena_free == 0
    assert not allocator.trim()
    with caplog.at_level(logging.DEBUG, logger="spillway"), arenas_logged("loading"):
        pass
    assert "loading: the C library gives no figures of its arenas" in caplog.text


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
