"""A collection is one that began after what was let go."""

import gc
import threading
import weakref

from spillway.ops.ram.garbage import collect_garbage


class Part:
    def __init__(self):
        self.whole = self


def test_what_refers_to_itself_is_freed_while_another_thread_collects(monkeypatch):
    """Python's own gc.collect does nothing then."""
    inside, go = threading.Event(), threading.Event()

    class Slow(Part):
        def __del__(self):
            inside.set()
            go.wait(20)

    Slow()
    gc.disable()
    try:
        other = threading.Thread(target=gc.collect)
        other.start()
        assert inside.wait(20)
        part = Part()
        gone = weakref.ref(part)
        del part
        gc.collect()
        assert gone() is not None, "the other thread collects"
        threading.Timer(0.2, go.set).start()
        assert collect_garbage() and gone() is None
        other.join()
    finally:
        go.set()
        gc.enable()


def test_a_collection_that_never_ends_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr("spillway.ops.ram.garbage.PAUSE_SECONDS", 0.001)
    assert not collect_garbage()
