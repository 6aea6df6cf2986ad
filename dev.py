#!/usr/bin/env python3
"""Developer commands of Spillway. They need Python 3.10 or newer and a package index that pip can reach, nothing else.

    python dev.py test [--only engine|comfyui|device|browser|soak] [--slow] [pytest arguments]
    python dev.py lint [--fix]
    python dev.py demo [arguments]
    python dev.py sim [--capacity 2GB] [--version 0.6.0] [arguments]
    python dev.py bench [NAME [arguments]]
    python dev.py probe FILE|ADDRESS...
    python dev.py convert FILE... [--to FOLDER]
    python dev.py soak [--minutes N] [--seed S] [--fuzz N | --kills N]
    python dev.py gpu [--only check|engine|comfyui|bench] [--short] [--fake] [--json FILE]
    python dev.py release [--untested | --archive FILE]

Each sets up what it needs in .venv beside this file, and a second call finds it there. `probe` says what is in a
safetensors or GGUF file and needs nothing. `convert` makes safetensors files of pickles (.ckpt, .pt, .pth, .bin), which
are not run, beside them or in a folder. `--only host` means `--only comfyui`, and `device` is ComfyUI on the fake
device of tests/fake_device, which runs a choice of the tests. `--slow` runs all of them there, for an hour or two, and
everywhere the slow tests and the planted faults. `browser` looks at the panel in Chromium, and with `--slow` in the
oldest and the newest frontend too. `soak` disturbs real ComfyUI servers and compares what they make with what fresh
ones make. `gpu` tests the GPU of this machine, measures on it, and exits with 2 where there is none. `release` says
what must still be mended before a version is tagged, and writes the archive that the registry would serve.

Variables:
    SPILLWAY_TORCH    what to install as torch in .venv, for example "torch==2.11.0"; pip options may follow
    COMFYUI_PATH      the ComfyUI to test in; else the one around this folder, else ~/comfy/ComfyUI
    COMFYUI_PYTHON    the Python that runs it; else a venv beside or inside it, else this one
"""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

# Not resolved: a pack linked into custom_nodes has its ComfyUI around the link.
ROOT = Path(os.path.abspath(__file__)).parent
TESTS = ROOT / "tests"
COMFYUI_TESTS = TESTS / "comfyui"  # the others in TESTS are the engine's
SOAK_TESTS = TESTS / "soak"
BROWSER_TESTS = COMFYUI_TESTS / "browser"
QUICK = "not slow and not planted"  # the tests of a run without --slow
NO_TESTS_COLLECTED = 5
AT_ONCE = 2  # processes of tests; each computes with two threads

sys.path.append(str(TESTS))
from kit.device_runs import RUNS, DeviceRun  # noqa: E402
from kit.environment import (  # noqa: E402
    add_playwright,
    add_pytest,
    banner,
    fail,
    find_chromium,
    install_stores,
    run,
    say,
    set_up_bench,
    set_up_demo,
    set_up_engine,
    set_up_tools,
    shell_code,
    test_environment,
    venv_python,
)
from kit.find_comfyui import WrongVariable, find_comfyui, find_comfyui_python  # noqa: E402
from kit.gpu import Command, Suites  # noqa: E402
from kit.gpu import main as gpu_main  # noqa: E402
from kit.mypy_engine import mypy_engine  # noqa: E402
from kit.release import main as release_main  # noqa: E402
from kit.release import note_tested  # noqa: E402
from kit.soak_runs import ONLY_MIX, SoakRun, asked_for  # noqa: E402

# `python -m pytest` would put this folder on sys.path, and ComfyUI's `import nodes` would find the pack's.
PYTEST = "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - this script is the first thing that an older Python meets
        return fail(f"dev.py needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    commands = {"test": test, "lint": lint, "demo": demo, "sim": sim, "bench": bench, "probe": probe}
    commands |= {"convert": convert, "soak": soak, "gpu": gpu, "release": release_main}
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if arguments[0] not in commands:
        return fail(f"There is no command {arguments[0]!r}; there are {', '.join(commands)}.", 2)
    return commands[arguments[0]](arguments[1:])


# Commands


def test(arguments: list[str]) -> int:
    """Run the engine's tests in .venv, those in ComfyUI in its own Python, and a choice of the latter on a device."""
    # The longest first, so that no core is idle at the end.
    parts = {"comfyui": comfyui_tests, "engine": engine_tests, "device": device_tests}
    parts |= {"soak": soak_tests(ONLY_MIX), "browser": browser_tests}
    wanted = {part_of(argument) for argument in arguments} - {None} or set(parts)
    if arguments[:1] == ["--only"]:
        wanted, arguments = {"comfyui" if part == "host" else part for part in arguments[1:2]}, arguments[2:]
        if not wanted or wanted - set(parts):
            return fail("--only takes engine, comfyui, device, browser or soak.", 2)
    whole = not arguments and wanted == set(parts)
    commands: dict[str, Command] = {}
    for name, prepare in parts.items():
        if name in wanted:
            mine = (None, "comfyui" if name == "device" else name)
            prepared = prepare([argument for argument in arguments if part_of(argument) in mine])
            whole = whole and bool(prepared)
            commands |= prepared
    ran = run_beside(commands)
    if not ran:
        return fail("No test ran.")

    # Arguments may select tests of one part alone. Without any, a part that collects nothing is broken.
    if arguments and any(code != NO_TESTS_COLLECTED for code in ran.values()):
        ran = {name: 0 if code == NO_TESTS_COLLECTED else code for name, code in ran.items()}
    for name, code in ran.items():
        if code:
            why = "no test was collected" if code == NO_TESTS_COLLECTED else f"pytest ended with code {code}"
            fail(f"The {name} tests failed: {why}.")
    if whole and not any(ran.values()):
        note_tested()
    return next((code for code in ran.values() if code), 0)


def lint(arguments: list[str]) -> int:
    """Run ruff over everything and mypy over the engine. All three report before any of them fails the command."""
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
    """Say what is in each of the model files named, from their headers alone."""
    if not arguments:
        return fail("probe takes the names of model files, or addresses.", 2)
    sys.path.insert(0, str(ROOT))
    module, errors = importlib.import_module("ops.parts.probe"), importlib.import_module("ops.files.safetensors_header")
    remote, store = importlib.import_module("ops.remote.probe"), importlib.import_module("ops.remote.store")
    failed = 0
    for name in arguments:
        try:
            found = remote.probe_address(name) if store.is_address(name) else module.probe(name)
            print(found.words, flush=True)
        except (errors.SourceError, OSError) as error:
            failed = fail(str(error))
    return failed


def convert(arguments: list[str]) -> int:
    return run_script(ROOT / "tests" / "kit" / "convert_pickles.py", arguments)


def soak(arguments: list[str]) -> int:
    """Run the soak for as long as asked for, and show what happens as it does."""
    ran = run_beside(soak_tests(asked_for(arguments))(["-s"]))
    return next(iter(ran.values()), 1)


def gpu(arguments: list[str]) -> int:
    set_up_engine()
    return gpu_main(arguments, Suites(engine_tests, comfyui_tests))


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
    """Say which part a pytest argument belongs to, where it is the path of a test."""
    path = Path(os.path.abspath(ROOT / argument.split("::")[0]))
    if not path.exists() or TESTS not in path.parents:
        return None
    parts = {BROWSER_TESTS: "browser", COMFYUI_TESTS: "comfyui", SOAK_TESTS: "soak"}
    return next((part for folder, part in parts.items() if path.is_relative_to(folder)), "engine")


def run_beside(commands: dict[str, Command]) -> dict[str, int]:
    """Run some at once, show what each prints as a whole (the first as it comes), and return the exit codes."""
    codes: dict[str, int] = {}
    processes: list[subprocess.Popen] = []

    def process(command: Command, output: BinaryIO) -> int:
        options = {"cwd": ROOT, "env": command.environment, "stdout": output, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command.command, **options))
        return processes[-1].wait()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pool = ThreadPoolExecutor(AT_ONCE)
        started = []
        for name, command in commands.items():
            output = stack.enter_context((folder / name).open("wb"))
            printed = stack.enter_context((folder / name).open("rb"))
            started.append((name, command.title, pool.submit(process, command, output), printed))
        # Where this is interrupted: what waits never starts, and what runs ends.
        stack.callback(pool.shutdown)
        stack.callback(lambda: [process.terminate() for process in processes])
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for name, title, future, printed in started:
            say(title)
            follow(future, printed)
            codes[name] = shell_code(future.result())
    return codes


def follow(future: Future, printed: BinaryIO) -> None:
    """Show what a process prints to the file until it has ended."""
    ended = False
    while True:
        sys.stdout.buffer.write(printed.read())
        sys.stdout.buffer.flush()
        if ended:
            return
        ended = future.done()
        if not ended:
            time.sleep(0.1)


def engine_tests(arguments: list[str]) -> dict[str, Command]:
    set_up_engine()
    if "--slow" in arguments:
        install_stores(venv_python())
    ignored = [f"--ignore={folder}" for folder in (COMFYUI_TESTS, SOAK_TESTS)]
    arguments = [*ignored, *chosen(arguments, f"{QUICK} and not every_release and not fuzz")]
    return {"engine": pytest("engine tests", venv_python(), arguments, test_environment())}


def comfyui_tests(arguments: list[str]) -> dict[str, Command]:
    """Nothing where there is nothing to run them with."""
    found = comfyui_and_python()
    if found is None:
        return {}
    comfyui, python, environment = found
    if "--slow" in arguments:
        install_stores(python)
    folders = [folder for folder in sorted(TESTS.iterdir()) if folder.is_dir() and folder != COMFYUI_TESTS]
    others = [f"--ignore={folder}" for folder in (*folders, BROWSER_TESTS)]
    title = f"tests in ComfyUI: {comfyui}, {python}"
    return {"comfyui": pytest(title, python, [*others, *chosen(arguments, QUICK)], environment)}


def device_tests(arguments: list[str]) -> dict[str, Command]:
    """The same ComfyUI on the fake device. Paths of tests take the place of the choice that is run without any."""
    found = comfyui_and_python()
    if found is None:
        return {}
    _, python, environment = found
    named = any(part_of(argument) for argument in arguments)
    slow = "--slow" in arguments
    arguments = chosen(arguments, QUICK)

    def command(name: str, run: DeviceRun) -> Command:
        choice = () if named else run.slow if slow else run.quick
        given = [*choice, *arguments]
        title = f"tests in ComfyUI on the fake device: {name}"
        return pytest(title, python, given, {**environment, **run.environment})

    return {name: command(name, run) for name, run in RUNS.items() if run.quick or named or slow}


def browser_tests(arguments: list[str]) -> dict[str, Command]:
    """Look at the panel in a Chromium of this machine. Nothing where there is none, which is said loudly."""
    found = comfyui_and_python()
    if found is None:
        return {}
    chromium = find_chromium()
    if chromium is None:
        banner(
            "NO CHROMIUM FOUND: the tests of the panel in a browser did not run",
            "Install Chromium (on Debian and Ubuntu: apt-get install chromium), or set SPILLWAY_CHROMIUM to its path.",
        )
        return {}
    _, python, environment = found
    add_playwright(python, environment)
    environment["SPILLWAY_CHROMIUM"] = chromium
    named = any(part_of(argument) == "browser" for argument in arguments)
    given = [*([] if named else [str(BROWSER_TESTS)]), *chosen(arguments, QUICK)]
    return {"browser": pytest(f"tests of the panel in {chromium}", python, given, environment)}


def soak_tests(run: SoakRun) -> Callable[[list[str]], dict[str, Command]]:
    """Return what makes the command of one run of the soak, which starts servers with the Python that it runs in."""

    def commands(arguments: list[str]) -> dict[str, Command]:
        if os.name == "nt":
            say("no soak: Windows lets nobody replace the file of a loaded model")
            return {}
        found = comfyui_and_python()
        if found is None:
            return {}
        _, python, environment = found
        given = [*run.arguments, *(argument for argument in arguments if argument != "--slow")]
        return {"soak": pytest(f"soak: {run.title}", python, given, {**environment, **run.environment})}

    return commands


def chosen(arguments: list[str], quick: str) -> list[str]:
    """Return pytest's arguments. quick: the expression of marks that chooses tests where `--slow` is not there."""
    if "--slow" in arguments:
        return [argument for argument in arguments if argument != "--slow"]
    return ["-m", quick, *arguments]


def comfyui_and_python() -> tuple[Path, Path, dict[str, str]] | None:
    """ComfyUI, its Python, and the variables that tests in it need. None where one is missing, which is said loudly."""
    try:
        comfyui = find_comfyui()
        python = comfyui and find_comfyui_python(comfyui)
    except WrongVariable as error:
        sys.exit(fail(str(error)))
    if comfyui is None:
        banner(
            "NO COMFYUI FOUND: the tests in ComfyUI did not run",
            "Set COMFYUI_PATH to a ComfyUI folder (and COMFYUI_PYTHON to the Python that runs it),",
            "put this folder into ComfyUI/custom_nodes, or install ComfyUI to ~/comfy/ComfyUI.",
        )
        return None
    if python is None:
        banner(
            "NO PYTHON FOR COMFYUI FOUND: the tests in ComfyUI did not run",
            f"ComfyUI: {comfyui}",
            "Set COMFYUI_PYTHON to the Python that runs it.",
        )
        return None
    # REQUIRE_HOST: with a ComfyUI here, one that cannot be imported is an error and no reason to skip.
    environment = {**test_environment(), "COMFYUI_PATH": str(comfyui), "SPILLWAY_REQUIRE_HOST": "1"}
    add_pytest(python, environment)
    return comfyui, python, environment


def pytest(title: str, python: Path, arguments: list[str], environment: dict[str, str]) -> Command:
    return Command(title, [str(python), "-c", PYTEST, "-p", "no:cacheprovider", *arguments], environment)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
