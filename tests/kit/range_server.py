"""A web server for the files of a folder, as slow and as faulty as a test wants it."""

import hashlib
import os
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 16 << 10


class RangeServer:
    """rate: bytes a second for all requests together. asked: (first, last) of each range that was asked for.

    fault: what the next answers are: '', 'no ranges', 'other range', 'packed', 'cut', 'busy', 'gone', 'other file' (one
    answer alone). trickles: so many of the next answers send a few bytes now and then, after half of them; or, where
    `in_head`, do so before them. gate: cleared, answers to ranges from `opened` on wait, but the first byte's. sent:
    bytes of bodies.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.rate, self.fault = float("inf"), ""
        self.trickles, self.in_head = 0, False
        self.asked, self.sent = [], 0
        self.told = []  # the headers of each request
        self.gate = threading.Event()
        self.gate.set()
        self.opened = 0
        self.marks = True
        self._lock, self._free_at = threading.Lock(), 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def address(self, name):
        return f"http://127.0.0.1:{self.port}/{name}"

    def serve(self):
        self._server.serve_forever(poll_interval=0.05)

    def stop(self):
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()

    def next_trickles(self):
        with self._lock:
            self.trickles -= 1
            return self.trickles >= 0

    def take(self, nbytes):
        """Wait until so many bytes may be sent."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + nbytes / self.rate
            self.sent += nbytes
        time.sleep(max(0.0, self._free_at - now) if self.rate < float("inf") else 0)


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            try:
                self._answer()
            except OSError:  # whoever asked has gone
                self.close_connection = True

        def _answer(self):
            server.told.append(dict(self.headers))
            if server.fault == "busy":
                self.send_error(503)
                return
            path = server.folder / self.path.split("?")[0].lstrip("/")
            if server.fault == "gone" or not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            asked = self.headers.get("Range", "")
            if server.fault == "no ranges" or not asked.startswith("bytes="):
                first, last, status = 0, size - 1, 200
            else:
                first, last = (int(number) for number in asked[6:].split("-"))
                last, status = min(last, size - 1), 206
                if last > 0:
                    server.asked.append((first, last))
                    while not server.gate.wait(0.02) and first >= server.opened:
                        pass
                if first >= size:
                    self.send_error(416)
                    return
            if server.fault == "other range":
                first, last = first + 7, last + 7
            trickles = last > 0 and server.next_trickles()
            if trickles and server.in_head:
                while not self.wfile.closed:
                    self.wfile.write(b"H")
                    time.sleep(0.02)
            self.send_response(status)
            self.send_header("Content-Length", str(last - first + 1))
            if server.marks:
                status_of = path.stat()
                mark = hashlib.sha256(f"{status_of.st_mtime_ns} {size}".encode()).hexdigest()[:16]
                if server.fault == "other file" and last > 0:
                    server.fault, mark = "", "another"
                self.send_header("ETag", f'"{mark}"')
            if server.fault == "packed":
                self.send_header("Content-Encoding", "gzip")
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            self._send(path, first, last, trickles)

        def _send(self, path, first, last, trickles):
            with open(path, "rb") as file:
                file.seek(first)
                left = last - first + 1
                if server.fault == "cut" and left > 1:
                    left //= 2
                few = left // 2
                while left:
                    data = file.read(1 if trickles and left <= few else min(CHUNK, max(1, left - few * trickles)))
                    if not data:
                        break
                    time.sleep(0.02 * (trickles and left <= few))
                    server.take(len(data))
                    self.wfile.write(data)
                    left -= len(data)
            if server.fault == "cut":
                self.close_connection = True

    return Handler


@contextmanager
def serving(folder):
    """Serve a folder while the block runs."""
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


def rewrite(path, seed=1):
    """Write other numbers of the same length into a file, at a later time."""
    data = bytearray(path.read_bytes())
    data[-1000:] = bytes((seed + number) % 251 for number in range(1000))
    path.write_bytes(data)
    later = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(later, later))
