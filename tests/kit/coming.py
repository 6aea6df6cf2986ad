"""Files that come from a server of the test, with NaN wherever a part has yet to come."""

import threading
from contextlib import contextmanager

from kit.range_server import serving
from spillway.ops.files.coming_file import coming_file
from spillway.ops.remote import fetch as fetching

BLOCK = 16 << 10
PAUSES = (0.01, 0.02)


def poison(coming):
    """Fill what has not come with bytes that are NaN in every dtype, so that a read without a wait shows."""
    with open(coming.data, "r+b") as file, coming.condition:
        for block, come in enumerate(coming.come):
            if not come:
                file.seek(block * coming.block_bytes)
                file.write(b"\xff" * min(coming.block_bytes, coming.file_bytes - file.tell()))


def begin(server, name, path, block_bytes=BLOCK):
    """Have a file come. Its gate is closed: nothing comes until the test opens it."""
    server.gate.clear()
    coming = fetching.fetch(server.address(name), path, block_bytes=block_bytes, pauses=PAUSES)
    poison(coming)
    return coming


@contextmanager
def slowly(original, folder, rate=float("inf"), block_bytes=BLOCK):
    """Let a file come to `folder`: its header once somebody waits for it, the rest once somebody waits for more.

    Without a rate, blocks come that somebody waits for, and no others. Whoever waits for nothing finds NaN. Yields
    (server, the path that it will have). In the end all of it has come.
    """
    with serving(original.parent) as server:
        server.rate = rate
        path = folder / original.name
        coming = begin(server, original.name, path, block_bytes)
        order = coming.bring.__self__._order
        if rate == float("inf"):
            order.take = lambda most: _asked_alone(order, coming, most)
        watching = threading.Event()
        watcher = threading.Thread(target=_open_when_asked, args=(server, coming, watching), daemon=True)
        watcher.start()
        try:
            yield server, path
            watching.set()
            watcher.join()
            server.rate = float("inf")
            vars(order).pop("take", None)
            server.gate.set()
            coming.wait()
            settle(path)
        finally:
            watching.set()
            server.gate.set()


def _asked_alone(order, coming, most):
    run = order._of(coming.asked, most)
    if run is not None:
        order._busy[run.start : run.stop] = b"\1" * len(run)
    return run


def _open_when_asked(server, coming, ended):
    header = coming.block_bytes
    while not ended.wait(0.005):
        asked = list(coming.asked)
        if asked:
            server.opened = header
        if any(offset + nbytes > header for offset, nbytes in asked):
            ended.wait(0.02)
            server.gate.set()
            return


def settle(path):
    """Wait until a file has its name."""
    done = threading.Event()
    for _ in range(500):
        if coming_file(path) is None:
            return
        done.wait(0.01)
    raise AssertionError(f"{path} does not get its name")
