"""POST /spillway/free: neither ComfyUI's queue nor whoever asked waits for the disk."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from kit.comfyui.executor import Executor, prompt
from spillway.cache import disk_tier
from spillway.nodes import routes

pytestmark = pytest.mark.usefixtures("installed", "user")


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that writes nothing until it is let."""
    go, began = threading.Event(), threading.Event()
    write = disk_tier.write

    def slow(*arguments):
        began.set()
        assert go.wait(60)
        write(*arguments)

    monkeypatch.setattr(disk_tier, "write", slow)
    yield SimpleNamespace(go=go, began=began)
    go.set()


def test_nobody_waits_for_the_disk(slow_disk):
    """The server's event loop takes the queue's lock at each request."""
    executor = Executor()
    executor.run(prompt())
    writer = executor.cache.engine.writer
    comfy_queue = SimpleNamespace(mutex=threading.Lock(), currently_running={}, set_flag=None)
    done = routes.free(comfy_queue, {"cache": True})
    assert not slow_disk.go.is_set() and slow_disk.began.wait(20), "it has answered while the first is being written"
    assert done["cache_bytes"] >= done["writing_bytes"] > 1 << 20
    assert executor.cache.engine.as_dict()["writing_bytes"] == done["writing_bytes"]
    assert comfy_queue.mutex.acquire(timeout=5)
    comfy_queue.mutex.release()

    before = time.monotonic()
    assert executor.run(prompt()) == ["Save"], "what is not written yet is found"
    assert time.monotonic() - before < 20
    slow_disk.go.set()
    assert writer.wait(60)
    assert routes.free(comfy_queue, {"cache": True})["cache_bytes"] > 1 << 20
    assert writer.wait(60) and Executor().run(prompt()) == ["Save"]


def test_what_takes_long_is_done_without_the_queues_lock(monkeypatch):
    """Memory of gigabytes that goes back, figures of all models and a garbage collection take long too."""
    executor = Executor()
    executor.run(prompt())
    held = SimpleNamespace(mutex=threading.Lock(), currently_running={}, set_flag=None)
    seen = []
    for owner, name in (
        (routes, "take_snapshot"),
        (executor.cache.engine, "let_go"),
        (routes.comfy.model_management, "soft_empty_cache"),
    ):
        whole = getattr(owner, name)

        def look(*arguments, name=name, whole=whole):
            seen.append((name, held.mutex.locked()))
            return whole(*arguments)

        monkeypatch.setattr(owner, name, look)
    routes.free(held, {"cache": True, "pins": True})
    assert {name for name, _ in seen} == {"take_snapshot", "let_go", "soft_empty_cache"}
    assert not any(locked for _, locked in seen)


@pytest.mark.parametrize("wanted", [{"models": True}, {"models": True, "cache": True, "pins": True}])
def test_a_model_that_nobody_wants_is_gone_when_the_route_has_answered(wanted):
    """Its parts refer to each other. The collector, which may not come by until another prompt ends, is run."""

    class Part:
        pass

    part = Part()
    part.whole = part
    gone = weakref.ref(part)
    held = SimpleNamespace(mutex=threading.Lock(), currently_running={}, set_flag=None)
    gc.disable()
    try:
        del part
        routes.free(held, wanted)
        assert gone() is None
    finally:
        gc.enable()


def test_what_waits_to_be_written_is_not_found_when_it_is_stale(slow_disk, user, monkeypatch):
    from spillway.cache.comfyui import stamps

    executor = Executor()
    executor.run(prompt())
    executor.cache.engine.evict(1 << 60)
    assert slow_disk.began.wait(20)
    monkeypatch.setattr(stamps, "still_hold", lambda record: False)
    assert "Sample" in executor.run(prompt())


def test_an_entry_that_is_no_output_of_a_node(user):
    """Its hashes are right, and it would end the worker."""
    first = Executor()
    first.run(prompt())
    first.cache.engine.evict(1 << 60)
    assert first.cache.engine.writer.wait(60)
    tier = first.cache.disk
    for outputs in ({"a": 1}, [1, 2], None, "text", (["a"],)):
        for path in tier.folder.glob("*.output"):
            stamps = tier.load(path.stem)[2]
            path.unlink()
            assert tier.store(path.stem, outputs, seconds=20.0, kind="Sample", stamps=stamps)
        later = Executor()
        assert set(later.run(prompt())) == {"Load", "Lora", "Encode", "Sample", "Decode", "Save"}
        assert "is no output of a node" in "".join(later.cache.ledger.decisions)
