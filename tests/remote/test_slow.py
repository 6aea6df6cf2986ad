"""A connection that hardly gets on is given up, another one goes on where it was, and a slow network is no error."""

import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kit.coming import BLOCK, PAUSES, settle
from kit.range_server import serving
from spillway.ops.remote import pace
from spillway.ops.remote.fetch import fetch
from spillway.ops.remote.open_store import open_store
from spillway.ops.remote.pace import Pace, within
from spillway.ops.remote.store import Unreachable

SIZE = 24 * BLOCK


@pytest.fixture
def original(tmp_path):
    (tmp_path / "there").mkdir()
    path = tmp_path / "there" / "model.safetensors"
    path.write_bytes(bytes((number * number // 7) % 251 for number in range(SIZE // 8)) * 8)
    return path


@pytest.fixture
def server(original):
    with serving(original.parent) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(pace, "PATIENCE", 0.3)
    monkeypatch.setattr(pace, "SLOWEST", 1 << 20)


def get(address, path):
    return fetch(address, path, block_bytes=BLOCK, pauses=PAUSES)


def finish(coming, path, original, seconds):
    began = time.monotonic()
    coming.wait()
    assert time.monotonic() - began < seconds
    settle(path)
    assert path.read_bytes() == original.read_bytes()


def test_a_range_that_trickles_goes_on_over_another_connection_where_it_was(server, original, tmp_path):
    """A byte now and then keeps a connection alive for hours: half a block would take 160 s here."""
    server.trickles = 3
    path = tmp_path / "models" / "model.safetensors"
    finish(get(server.address(original.name), path), path, original, 20)
    middles = [first for first, _ in server.asked if first % BLOCK]
    assert len(middles) >= 3, "what had come of the range was brought again"
    assert sum(last + 1 - first for first, last in server.asked) < SIZE + 3 * BLOCK


def test_a_head_that_trickles_is_given_up_too(server, original, tmp_path, monkeypatch):
    server.in_head = True
    store = open_store(server.address(original.name))
    store.timeout = 0.3
    state = store.state()
    server.trickles = 1
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no whole answer within"):
        store.read(BLOCK, 100, state, 0.3)
    assert time.monotonic() - began < 5
    assert store.read(BLOCK, 100, state, 0.3) == original.read_bytes()[BLOCK : BLOCK + 100]


def test_a_server_that_trickles_on_every_connection_is_named(server, original, tmp_path):
    server.trickles = 1000
    path = tmp_path / "models" / "model.safetensors"
    coming = get(server.address(original.name), path)
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"in 3 tries: \d+ of \d+ bytes came in 0 s"):
        coming.wait()
    assert time.monotonic() - began < 20
    server.trickles = 0
    finish(get(server.address(original.name), path), path, original, 20)


class Hanging(MemoryFileSystem):
    """One connection, which hangs at the third range. A new one does not."""

    protocol, cachable = "hanging", False
    hangs, asked, opened = threading.Event(), 0, 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        Hanging.opened += 1

    @classmethod
    def _strip_protocol(cls, path):
        return "/models/model.safetensors"

    def cat_file(self, *args, **kwargs):
        Hanging.asked += 1
        if Hanging.asked == 3:
            Hanging.hangs.wait(30)
        return super().cat_file(*args, **kwargs)


def test_a_driver_that_hangs_is_opened_anew(original, tmp_path):
    MemoryFileSystem.store.clear()
    fsspec.filesystem("memory").pipe("/models/model.safetensors", original.read_bytes())
    fsspec.register_implementation("hanging", Hanging, clobber=True)
    path = tmp_path / "models" / "model.safetensors"
    try:
        finish(get("hanging://models/model.safetensors", path), path, original, 15)
        assert Hanging.opened >= 2
    finally:
        Hanging.hangs.set()
        MemoryFileSystem.store.clear()


def test_a_network_that_becomes_slow_is_waited_for(monkeypatch):
    """Where all connections are slow, each that is given up makes the next one's limit longer."""
    monkeypatch.setattr(pace, "PATIENCE", 30.0)
    monkeypatch.setattr(pace, "SLOWEST", 4 << 10)
    found = Pace()
    assert found.limit(256 << 10) == 30 + 64
    found.took(16 << 20, 0.1)  # 160 MB/s
    strict = found.limit(16 << 20)
    assert 31 < strict < 33
    for _ in range(4):  # as the four threads meet it
        found.given_up()
    assert found.limit(16 << 20) > 400
    for _ in range(20):
        found.given_up()
    assert found.limit(256 << 10) == 30 + 64


def test_what_fails_in_another_thread_fails_here():
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    assert within(5, lambda: 3) == 3
