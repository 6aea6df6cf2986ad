"""Compiles the device with the system's C++ compiler, each file once for each torch and state of its source."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cuda_sim import Unavailable

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "src"
CACHE = HERE / "cache"  # compiled, never committed
FLAGS = ["-O1", "-fPIC", "-w"]
OLDEST_TORCH = (2, 8)
LAST_IN_CPP17 = (2, 13)  # headers of 2.15 are C++20


def device() -> Path:
    """The compiled device. Raises Unavailable where it cannot be built."""
    if sys.platform != "linux":
        raise Unavailable(f"the fake device needs Linux, as the simulated driver does; this is {sys.platform}")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise Unavailable(f"the fake device needs torch 2.8 or newer; this is {torch.__version__}")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise Unavailable(
            "no C++ compiler (c++, g++, clang++): install one, on Debian and Ubuntu the package build-essential"
        )
    root = Path(torch.__path__[0])
    flags = ["-std=c++17" if version <= LAST_IN_CPP17 else "-std=c++20", *FLAGS]
    compile_file = [compiler, "-c", *flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    compile_file += [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    headers = [path.read_text() for path in sorted(SOURCE.glob("*.h"))]
    common = [torch.__version__, platform.machine(), *compile_file, *headers]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(
            pool.map(
                lambda source: made(source.stem, ".o", [*common, source.read_text()], [*compile_file, str(source)]),
                sorted(SOURCE.glob("*.cpp")),
            )
        )
    files = [str(path) for path in objects]
    link = [compiler, "-shared", *files, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
    return made("fake-device", ".so", files, link)


def made(name: str, ending: str, state: list[str], command: list[str]) -> Path:
    """The file that a command writes to the path after its -o, where it is not there yet in just this state."""
    digest = hashlib.sha256("\0".join(state).encode()).hexdigest()[:16]
    path = CACHE / f"{name}-{digest}{ending}"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        # Under a name of its own until it is whole: several processes may build at once.
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            part = Path(folder) / path.name
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                words = f"the fake device does not compile with torch {torch.__version__}"
                raise Unavailable(f"{words} ({name}):\n{done.stderr[-4000:]}")
            part.replace(path)
    return path
