"""Set up the environments that dev.py needs: .venv, and pytest beside ComfyUI's Python.

Imports the standard library alone, because the Python that runs dev.py may have nothing else.

A folder in an environment has a stamp, which says for what it was installed. A second call finds that and does nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Not resolved: a pack linked into custom_nodes has its ComfyUI around the link.
ROOT = Path(os.path.abspath(__file__)).parents[2]
VENV = ROOT / ".venv"
HOST_TOOLS = ROOT / ".host-tools"
REQUIREMENTS = ROOT / "requirements.txt"
REQUIREMENTS_DEV = ROOT / "requirements-dev.txt"
REQUIREMENTS_DEMO = ROOT / "benchmarks" / "demo" / "requirements.txt"
REQUIREMENTS_BENCH = ROOT / "benchmarks" / "requirements.txt"
REQUIREMENTS_STORES = ROOT / "tests" / "cache" / "store" / "requirements.txt"
REQUIREMENTS_BROWSER = ROOT / "tests" / "comfyui" / "browser" / "requirements.txt"
DEFAULT_TORCH = "torch==2.13.0"
RECENT_TORCH = "import sys, torch; sys.exit([int(n) for n in torch.__version__.split('.')[:2]] < [2, 8])"


def set_up_tools() -> None:
    set_up("tools", [REQUIREMENTS_DEV], "", install_tools)


def set_up_engine() -> None:
    set_up_tools()
    set_up("engine", [REQUIREMENTS], os.environ.get("SPILLWAY_TORCH", ""), install_engine)


def set_up_demo() -> None:
    set_up_engine()
    set_up("demo", [REQUIREMENTS_DEMO], "", install_demo)


def set_up_bench() -> None:
    set_up_engine()
    if REQUIREMENTS_BENCH.is_file():
        files = [REQUIREMENTS, REQUIREMENTS_BENCH]
        set_up("bench", files, os.environ.get("SPILLWAY_TORCH", ""), install_bench)


def set_up(name: str, files: list[Path], extra: str, install) -> None:
    """Call install unless .venv has a stamp that says it was done for just these files."""
    folder = VENV / f"spillway-{name}"
    fingerprint = digest(*(path.read_text(encoding="utf-8") for path in files), extra)
    if venv_python().is_file() and stamp(folder) == fingerprint:
        return
    make_venv()
    install()
    write_stamp(folder, fingerprint)


def make_venv() -> None:
    command = [sys.executable, "-m", "venv", str(VENV)]
    if not venv_python().is_file():
        command.append("--clear")  # nothing there, or made by a Python that has gone
    elif succeeds([str(venv_python()), "-m", "pip", "--version"]):
        return
    say(f"making .venv with Python {sys.version.split()[0]}")
    code = run(command)
    if code:
        fail("Making .venv failed. On Debian and Ubuntu the package python3-venv is needed.")
        sys.exit(code)


def install_tools() -> None:
    pip_install(venv_python(), ["-r", str(REQUIREMENTS_DEV)], REQUIREMENTS_DEV.name)


def install_engine() -> None:
    torch = os.environ.get("SPILLWAY_TORCH", "").split()
    if torch or not succeeds([str(venv_python()), "-c", RECENT_TORCH]):
        torch = torch or [DEFAULT_TORCH]
        pip_install(venv_python(), torch, f"{' '.join(torch)} (can be large; SPILLWAY_TORCH chooses another)")
    pip_install(venv_python(), ["-r", str(REQUIREMENTS)], REQUIREMENTS.name)


def install_demo() -> None:
    pip_install(venv_python(), ["-r", str(REQUIREMENTS_DEMO)], f"{REQUIREMENTS_DEMO.name} of the demo")


def install_bench() -> None:
    """Install the peers, and hold torch to the one that .venv has. Pip would else replace it by the newest."""
    asked = [str(venv_python()), "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    constraint = VENV / "bench-constraint.txt"
    constraint.write_text(f"torch=={version}\n", encoding="utf-8")
    what = ["-c", str(constraint), "-r", str(REQUIREMENTS_BENCH)]
    pip_install(venv_python(), what, f"{REQUIREMENTS_BENCH.name} of the benchmarks, for torch {version}")


def pip_install(python: Path, what: list[str], words: str) -> None:
    say(f"installing {words}")
    code = run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", *what])
    if code:
        fail(f"Installing {words} failed: pip ended with code {code}.")
        sys.exit(code)


def venv_python(venv: Path = VENV) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def stamp(folder: Path) -> str:
    path = folder / "stamp"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def write_stamp(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stamp").write_text(text, encoding="utf-8")


def add_pytest(python: Path, environment: dict[str, str]) -> None:
    """Make pytest and hypothesis importable without a change to ComfyUI's own environment."""
    lines = REQUIREMENTS_DEV.read_text(encoding="utf-8").splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    add_tools(python, environment, [line for line in lines if line.startswith(("pytest", "hypothesis"))])


def add_playwright(python: Path, environment: dict[str, str]) -> None:
    """Make playwright importable likewise."""
    add_tools(python, environment, REQUIREMENTS_BROWSER.read_text(encoding="utf-8").splitlines(), "browser-")


def install_stores(python: Path) -> None:
    """Install what tests of shared stores need, an S3 and its driver, where `stores_folder` says. It is 130 MB."""
    folder, fingerprint = stores_folder(python), digest(REQUIREMENTS_STORES.read_text(encoding="utf-8"))
    if stamp(folder) == fingerprint:
        return
    shutil.rmtree(folder, ignore_errors=True)
    what = ["--target", str(folder), "-r", str(REQUIREMENTS_STORES)]
    pip_install(python, what, f"an S3 for tests into {folder.relative_to(ROOT)}")
    write_stamp(folder, fingerprint)


def stores_folder(python: Path | str) -> Path:
    """Return a folder for this Python. Tests alone look there: its versions of common packages are for nobody else."""
    return HOST_TOOLS / f"stores-{cache_tag(python)}"


def cache_tag(python: Path | str) -> str:
    asked = [str(python), "-c", "import sys; print(sys.implementation.cache_tag)"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "unknown"


def add_tools(python: Path, environment: dict[str, str], wanted: list[str], prefix: str = "") -> None:
    """Install requirements into a folder of their own, and put it on the path. Nothing where Python has them.

    prefix: of the folder's name.
    """
    names = [re.split("[^a-z]", line)[0] for line in wanted]
    if succeeds([str(python), "-c", f"import {', '.join(names)}"]):
        return
    # One folder for each Python: hypothesis has compiled parts.
    folder = HOST_TOOLS / f"{prefix}{cache_tag(python)}"
    fingerprint = digest(*wanted)
    if stamp(folder) != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        words = f"{' and '.join(names)} into {folder.relative_to(ROOT)}"
        pip_install(python, ["--target", str(folder), *wanted], words)
        write_stamp(folder, fingerprint)
    path = [str(folder), environment.get("PYTHONPATH") or os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))


def find_chromium() -> str | None:
    """Return the path of a Chromium or Chrome on this machine. SPILLWAY_CHROMIUM names another."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("SPILLWAY_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def test_environment() -> dict[str, str]:
    """Return the variables of processes that run tests."""
    # Parity tests compare bit for bit. MKL picks its kernels by a buffer's alignment unless MKL_CBWR is set, and sums
    # are split by thread, so both are fixed, before torch is imported.
    return {**os.environ, "MKL_CBWR": "AUTO", "OMP_NUM_THREADS": "2"}


# Processes and words


def run(command: list[str]) -> int:
    return shell_code(subprocess.run(command, cwd=ROOT).returncode)


def shell_code(code: int) -> int:
    return 128 - code if code < 0 else code  # ended by a signal: what a shell would say


def succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def say(text: str) -> None:
    print(f"--- {text}", flush=True)


def fail(text: str, code: int = 1) -> int:
    print(f"dev.py: {text}", file=sys.stderr, flush=True)
    return code


def banner(*lines: str) -> None:
    bar = "!" * 88
    print("\n".join(["", bar, *(f"!!  {line}" for line in lines), bar, ""]), flush=True)
