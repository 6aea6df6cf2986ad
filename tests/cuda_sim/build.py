"""Compile the driver with the system's C compiler, once for each state of its source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from . import CACHE, Unavailable

SOURCE = Path(__file__).resolve().parent / "driver"
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-fPIC", "-shared", "-fvisibility=hidden"]
# comfy-aimdo looks for a library of this name among those that are loaded.
NAME = "libcuda.so.1"


def driver() -> Path:
    """The compiled driver. Raises Unavailable where it cannot be built."""
    if sys.platform != "linux":
        raise Unavailable(f"the simulated driver needs Linux (memfd, libcuda.so.1); this is {sys.platform}")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable(
            "no C compiler (cc, gcc, clang): install one, on Debian and Ubuntu the package build-essential"
        )
    files = sorted(SOURCE.glob("*.[ch]"))
    state = hashlib.sha256("\0".join([compiler, *FLAGS, *(file.read_text() for file in files)]).encode())
    built = CACHE / f"driver-{state.hexdigest()[:16]}" / NAME
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own until it is whole: several processes and threads may build at once.
        part = built.with_name(f"{os.getpid()}-{threading.get_ident()}.so")
        sources = [str(file) for file in files if file.suffix == ".c"]
        command = [compiler, *FLAGS, f"-Wl,-soname,{NAME}", "-o", str(part), *sources, "-lpthread", "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"the simulated driver does not compile with {compiler}:\n{done.stderr}")
        part.replace(built)
    return built
