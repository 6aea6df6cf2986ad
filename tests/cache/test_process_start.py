"""When a process was started is known to a hundredth of a second, so that little counts as changed since by mistake."""

import subprocess
import sys
import time

import pytest

from kit.pack import ROOT
from spillway.cache import process_start as module
from spillway.cache.process_start import process_start

SAYS = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("process_start", {str(ROOT / "cache" / "process_start.py")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.process_start())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others' systems tell it exactly, or as well as they can")
def test_it_is_between_before_and_after():
    for _ in range(3):
        time.sleep(0.37)  # into another part of a second
        before = time.time_ns()
        done = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True)
        assert before - 20_000_000 <= int(done.stdout) <= time.time_ns()


def test_where_the_kernel_does_not_tell_psutil_does(monkeypatch):
    known = process_start()
    monkeypatch.setattr(module.time, "clock_gettime", lambda clock: (_ for _ in ()).throw(OSError()), raising=False)
    assert 0 <= known - process_start() < 1_100_000_000
