"""What the workflows of GitHub and `.ci/run` call is there, with the arguments that they give.

Else a workflow would be the first to find that something has gone, weeks later.
"""

import importlib.util
import re
import shlex

import pytest

from kit import gpu, release
from kit.pack import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CI = ROOT / ".ci" / "run"
OPTIONS = ("-m", "-p", "-k", "-q", "-x", "--ignore=", "--deselect=")  # of pytest, which dev.py passes on


def called(path):
    """The arguments of each call of dev.py. What a shell would put in is left out, or is a name."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.strip().startswith("#")]
    found = re.findall(r"python3? dev\.py (.*)", "\n".join(lines))
    return [shlex.split(line.replace('"${parts[@]}"', "").replace('"$(mktemp)"', "file")) for line in found]


CALLS = [(path.name, words) for path in (*WORKFLOWS, CI) if path.is_file() for words in called(path)]


@pytest.fixture
def accepted(monkeypatch):
    """Return a function: does dev.py take these arguments? It installs and runs nothing."""
    spec = importlib.util.spec_from_file_location("dev", ROOT / "dev.py")
    dev = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dev)
    commands = []

    def note(given):
        commands.extend(command.command for command in given.values())
        return dict.fromkeys(given, 0)

    for name in ("set_up_engine", "set_up_tools", "install_stores", "add_playwright", "note_tested"):
        monkeypatch.setattr(dev, name, lambda *_: None)
    monkeypatch.setattr(dev, "comfyui_and_python", lambda: (ROOT, dev.venv_python(), {}))
    monkeypatch.setattr(dev, "find_chromium", lambda: "chromium")
    monkeypatch.setattr(dev, "run_beside", note)
    monkeypatch.setattr(dev, "run", lambda _: 0)
    monkeypatch.setattr(dev, "mypy_engine", lambda _: 0)
    monkeypatch.setattr(dev, "gpu_main", lambda arguments, _: 0 if gpu.parse(arguments) else 2)
    for name in ("version", "archive", "result", "tree", "test"):
        monkeypatch.setattr(release, f"{name}_faults", lambda: iter(()))

    def ask(words):
        monkeypatch.setattr(dev.sys, "argv", ["dev.py", *words])
        commands.clear()
        try:
            code = dev.main()
        except SystemExit as error:
            code = error.code
        given = [word for command in commands for word in command[command.index("no:cacheprovider") + 1 :]]
        named = [
            word.removeprefix("--ignore=").removeprefix("--deselect=").split("::")[0] for word in given if "/" in word
        ]
        known = all(word.startswith(OPTIONS) for word in given if word.startswith("-"))
        return code == 0 and known and all((ROOT / name).exists() for name in named)

    return ask


@pytest.mark.skipif(not CI.is_file(), reason="no repository here")
def test_every_file_calls_something():
    assert {name for name, _ in CALLS} == {"ci.yml", "lanes.yml", "publish.yml", "run"}


@pytest.mark.parametrize(("where", "words"), CALLS, ids=[f"{where}: {' '.join(words)}" for where, words in CALLS])
def test_dev_takes_what_a_workflow_gives(where, words, accepted):
    assert accepted(words)


@pytest.mark.parametrize(
    "line",
    [
        "tests",
        "test --only engines",
        "test --only",
        "test --fast",
        "test --only browser tests/comfyui/browser/test_nowhere.py",
        "lint --all",
        "release --quick",
        "gpu --only nothing",
        "gpu --simulated",
    ],
)
def test_a_line_that_dev_does_not_take_is_found(line, accepted):
    assert not accepted(line.split())


def jobs(text):
    """The text of each job of a workflow, by its name."""
    found = re.split(r"^  (\w[\w-]*):$", text.partition("\njobs:\n")[2], flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_a_job_has_the_folders_and_names_that_it_uses(path):
    """A working directory is one that a checkout made, and each name of the matrix is in it."""
    found = jobs(path.read_text(encoding="utf-8"))
    assert found
    for name, text in found.items():
        made = set(re.findall(r"^ +path: (.+)$", text, re.MULTILINE))
        for folder in re.findall(r"^ +working-directory: (.+)$", text, re.MULTILINE):
            assert folder in made, f"{path.name}, {name}: no step makes {folder}"
        for key in re.findall(r"matrix\.(\w+)", text):
            assert re.search(rf"(?:^ +|[{{,] ?|- ){key}: ", text, re.MULTILINE), f"{path.name}, {name}: no {key}"
