"""A simulated device whose readers are real threads."""

import threading

from kit.sim_device import SimDevice
from spillway.ops.device import readers


class Threaded(SimDevice):
    """Whose readers are threads. Its streams run at once, as they are not made for several threads."""

    def __init__(self, count=3, **options):
        super().__init__(eager=True, **options)
        self.threads = readers.Threads(count)
        self.lock = threading.RLock()

    def readers(self):
        return self.threads

    def copy(self, *arguments):
        with self.lock:
            super().copy(*arguments)

    def record(self, stream):
        with self.lock:
            return super().record(stream)

    def wait(self, event, stream):
        with self.lock:
            super().wait(event, stream)
