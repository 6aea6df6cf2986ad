"""Run code in a process of its own, where nothing that earlier tests left is freed while memory is measured."""

import os
import subprocess
import sys

from kit.pack import ROOT
from spillway.ops.ram.allocator import USERS_OWN


def in_own_process(code, *arguments, **environment):
    """Return what `code` prints. It can import as tests do. environment: variables besides the caller's.

    Variables that the caller set for glibc's allocator are not passed on. Fails with the process's errors.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in USERS_OWN}
    inherited["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "tests"), inherited.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
