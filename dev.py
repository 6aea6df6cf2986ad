#!/usr/bin/env python3
"""Developer commands of Spillway. They need Python 3.10 or newer and a package index that pip can reach, nothing else.

    python dev.py test [--only engine|host] [pytest arguments]
    python dev.py lint [--fix]
    python dev.py demo [arguments]
    python dev.py sim [--capacity 2GB] [--version 0.6.0] [arguments]
    python dev.py bench [NAME [arguments]]
    python dev.py probe FILE...

Each sets up what it needs in .venv beside this file; a second call finds it there. `probe` says what is in a
safetensors file and needs nothing.

Variables:
    SPILLWAY_TORCH    what to install as torch in .venv, for example "torch==2.11.0"; pip options may follow
    COMFYUI_PATH      the ComfyUI that host tests run against; else the one around this folder, else ~/comfy/ComfyUI
    COMFYUI_PYTHON    the Python that runs it; else a venv beside or inside it, else this one
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

# Not resolved: a pack linked into custom_nodes has its ComfyUI around the link.
ROOT = Path(os.path.abspath(__file__)).parent
VENV = ROOT / ".venv"
TESTS = ROOT / "tests"  # tests/host holds the host tests, the rest are the engine's
HOST_TOOLS = ROOT / ".host-tools"
REQUIREMENTS = ROOT / "requirements.txt"
REQUIREMENTS_DEV = ROOT / "requirements-dev.txt"
REQUIREMENTS_DEMO = ROOT / "benchmarks" / "demo" / "requirements.txt"
REQUIREMENTS_BENCH = ROOT / "benchmarks" / "requirements.txt"
ENGINE = ("patcher", "ops", "cache")
DEFAULT_TORCH = "torch==2.13.0"
NO_TESTS_COLLECTED = 5

# `python -m pytest` would put this folder on sys.path, and the host's `import nodes` would find the pack's.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"
RECENT_TORCH = "import sys, torch; sys.exit([int(n) for n in torch.__version__.split('.')[:2]] < [2, 8])"


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - this script is the first thing that an older Python meets
        return fail(f"dev.py needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    commands = {"test": test, "lint": lint, "demo": demo, "sim": sim, "bench": bench, "probe": probe}
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        return fail(f"There is no command {arguments[0]!r}; there are {', '.join(commands)}.", 2)
    return commands[arguments[0]](arguments[1:])


# Commands


def test(arguments: list[str]) -> int:
    """Engine tests in .venv, and host tests in ComfyUI's own Python beside them."""
    parts = {"engine": engine_tests, "host": host_tests}
    wanted = {part_of(argument) for argument in arguments} - {None} or set(parts)
    if arguments[:1] == ["--only"]:
        wanted, arguments = set(arguments[1:2]), arguments[2:]
        if not wanted or wanted - set(parts):
            return fail("--only takes engine or host.", 2)
    commands = {
        name: prepare([argument for argument in arguments if part_of(argument) in (None, name)])
        for name, prepare in parts.items()
        if name in wanted
    }
    ran = run_beside({name: command for name, command in commands.items() if command is not None})
    if not ran:
        return fail("No test ran.")

    # Arguments may select tests of one part alone. Without any, a part that collects nothing is broken.
    if arguments and any(code != NO_TESTS_COLLECTED for code in ran.values()):
        ran = {name: 0 if code == NO_TESTS_COLLECTED else code for name, code in ran.items()}
    for name, code in ran.items():
        if code:
            why = "no test was collected" if code == NO_TESTS_COLLECTED else f"pytest ended with code {code}"
            fail(f"The {name} tests failed: {why}.")
    return next((code for code in ran.values() if code), 0)


def lint(arguments: list[str]) -> int:
    """ruff over everything, mypy over the engine. All three report before any of them fails the command."""
    if arguments not in ([], ["--fix"]):
        return fail(f"lint takes --fix or nothing, not {' '.join(arguments)!r}.", 2)
    set_up_tools()
    python = str(venv_python())
    if arguments:
        checks = {"ruff check --fix": ["check", "--fix", "."], "ruff format": ["format", "."]}
    else:
        checks = {"ruff check": ["check", "."], "ruff format --check": ["format", "--check", "."]}
    codes = {}
    for name, command in checks.items():
        say(name)
        codes[name] = run([python, "-m", "ruff", *command])
    say("mypy, engine files")
    codes["mypy"] = mypy_engine(python)
    for name, code in codes.items():
        if code:
            fail(f"{name} failed with code {code}.")
    return next((code for code in codes.values() if code), 0)


def demo(arguments: list[str]) -> int:
    set_up_demo()
    return run_script(ROOT / "benchmarks" / "demo" / "run.py", arguments)


def sim(arguments: list[str]) -> int:
    return run_script(TESTS / "cuda_sim" / "demo.py", arguments)


def bench(arguments: list[str]) -> int:
    scripts = {path.stem: path for path in sorted((ROOT / "benchmarks").glob("[!_]*.py"))}
    if not arguments:
        for name, path in scripts.items():
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "(no description)"
            print(f"{name:24} {doc.splitlines()[0]}")
        return 0
    if arguments[0] not in scripts:
        return fail(f"There is no benchmark {arguments[0]!r}; `dev.py bench` lists them.", 2)
    set_up_bench()
    return run_script(scripts[arguments[0]], arguments[1:])


def probe(arguments: list[str]) -> int:
    """Say what is in each of the safetensors files named, from their headers alone."""
    if not arguments:
        return fail("probe takes the names of safetensors files.", 2)
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module("ops.files.probe")
    failed = 0
    for name in arguments:
        try:
            print(module.probe(name).words, flush=True)
        except (module.SourceError, OSError) as error:
            failed = fail(str(error))
    return failed


def run_script(path: Path, arguments: list[str]) -> int:
    if not path.is_file():
        return fail(f"{path.relative_to(ROOT)} is missing.")
    set_up_engine()
    code = run([str(venv_python()), str(path), *arguments])
    if code:
        fail(f"{path.relative_to(ROOT)} failed with code {code}.")
    return code


# Tests


def part_of(argument: str) -> str | None:
    """Which part a pytest argument belongs to, where it is the path of a test."""
    path = Path(os.path.abspath(ROOT / argument.split("::")[0]))
    if not path.exists() or TESTS not in path.parents:
        return None
    return "host" if path.is_relative_to(TESTS / "host") else "engine"


class Command(NamedTuple):
    title: str
    command: list[str]
    environment: dict[str, str]


def run_beside(commands: dict[str, Command]) -> dict[str, int]:
    """Run all at once; the exit codes. What each prints is shown whole, in their order, the first as it comes."""
    codes: dict[str, int] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = []
        for name, (title, command, environment) in commands.items():
            output = stack.enter_context((folder / name).open("wb"))
            printed = stack.enter_context((folder / name).open("rb"))
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.terminate)  # where this is interrupted
            started.append((name, title, process, printed))
        for name, title, process, printed in started:
            say(title)
            follow(process, printed)
            codes[name] = shell_code(process.returncode)
    return codes


def follow(process: subprocess.Popen, printed: BinaryIO) -> None:
    """Show what a process prints to the file until it has ended."""
    ended = False
    while True:
        sys.stdout.buffer.write(printed.read())
        sys.stdout.buffer.flush()
        if ended:
            return
        ended = process.poll() is not None
        if not ended:
            time.sleep(0.1)


def engine_tests(arguments: list[str]) -> Command:
    set_up_engine()
    return pytest("engine tests", venv_python(), [f"--ignore={TESTS / 'host'}", *arguments], test_environment())


def host_tests(arguments: list[str]) -> Command | None:
    """None where there is nothing to run them with."""
    comfyui = find_comfyui()
    if comfyui is None:
        banner(
            "NO COMFYUI FOUND: host tests did not run",
            "Set COMFYUI_PATH to a ComfyUI folder (and COMFYUI_PYTHON to the Python that runs it),",
            "put this folder into ComfyUI/custom_nodes, or install ComfyUI to ~/comfy/ComfyUI.",
        )
        return None
    python = find_comfyui_python(comfyui)
    if python is None:
        banner(
            "NO PYTHON FOR COMFYUI FOUND: host tests did not run",
            f"ComfyUI: {comfyui}",
            "Set COMFYUI_PYTHON to the Python that runs it.",
        )
        return None
    # REQUIRE_HOST: with a ComfyUI here, one that cannot be imported is an error and no reason to skip.
    environment = {**test_environment(), "COMFYUI_PATH": str(comfyui), "SPILLWAY_REQUIRE_HOST": "1"}
    add_host_tools(python, environment)
    title = f"host tests: {comfyui}, {python}"
    return pytest(title, python, [f"--ignore-glob={TESTS / 'test_*.py'}", *arguments], environment)


def pytest(title: str, python: Path, arguments: list[str], environment: dict[str, str]) -> Command:
    return Command(title, [str(python), "-c", PYTEST, "-p", "no:cacheprovider", *arguments], environment)


def test_environment() -> dict[str, str]:
    # Parity tests compare bit for bit. MKL picks its kernels by a buffer's alignment unless MKL_CBWR is set, and sums
    # are split by thread, so both are fixed, before torch is imported.
    return {**os.environ, "MKL_CBWR": "AUTO", "OMP_NUM_THREADS": "2"}


def find_comfyui() -> Path | None:
    named = os.environ.get("COMFYUI_PATH")
    if named:
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            sys.exit(fail(f"COMFYUI_PATH is {named}, which has no comfyui_version.py. Set it to a ComfyUI folder."))
        return folder
    candidates = [Path.home() / "comfy" / "ComfyUI"]
    if ROOT.parent.name == "custom_nodes":
        candidates.insert(0, ROOT.parent.parent)
    return next(filter(is_comfyui, candidates), None)


def is_comfyui(folder: Path) -> bool:
    return (folder / "comfyui_version.py").is_file()


def find_comfyui_python(comfyui: Path) -> Path | None:
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        found = shutil.which(named)
        if found is None:
            sys.exit(fail(f"COMFYUI_PYTHON is {named}, which cannot be run."))
        return Path(found).absolute()
    venvs = (comfyui.parent / "venv", comfyui / "venv", comfyui / ".venv")
    portable = comfyui.parent / "python_embeded" / "python.exe"  # spelled so in ComfyUI's download for Windows
    for python in (*map(venv_python, venvs), portable):
        if python.is_file():
            return python
    return Path(sys.executable) if succeeds([sys.executable, "-c", "import torch, aiohttp"]) else None


def add_host_tools(python: Path, environment: dict[str, str]) -> None:
    """Make pytest and hypothesis importable without a change to the host's own environment."""
    if succeeds([str(python), "-c", "import pytest, hypothesis"]):
        return
    # One folder for each Python: hypothesis has compiled parts.
    tag = subprocess.run(
        [str(python), "-c", "import sys; print(sys.implementation.cache_tag)"], capture_output=True, text=True
    ).stdout.strip()
    folder = HOST_TOOLS / (tag or "unknown")
    lines = REQUIREMENTS_DEV.read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line.startswith(("pytest", "hypothesis"))]
    fingerprint = digest(*wanted)
    if stamp(folder) != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
        words = f"pytest and hypothesis into {folder.relative_to(ROOT)}"
        pip_install(python, ["--target", str(folder), *wanted], words)
        write_stamp(folder, fingerprint)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


# mypy


def mypy_engine(python: str) -> int:
    """Check a copy of the engine laid out as the package `spillway`: only so do the pack's relative imports resolve."""
    sources = [path for part in ENGINE for path in (ROOT / part).rglob("*.py") if "comfyui" not in path.parts]
    if not sources:
        print("no engine files")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "spillway"
        for source in sources:
            copy = package / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
        (package / "__init__.py").touch()  # empty: the real one leads to the host layer
        cache = ROOT / ".mypy_cache"
        options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(cache), "-p", "spillway"]
        done = subprocess.run([python, "-m", "mypy", *options], cwd=folder, capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        print(line.removeprefix("spillway" + os.sep))
    return done.returncode


# Set-up


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
    """The peers depend on torch, and pip would gladly bring another one: it is held to just the one that .venv has."""
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
