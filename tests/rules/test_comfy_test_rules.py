"""What comfy-test's first level refuses in an archive, and what Windows' code page would break, is nowhere in the pack.

The level reads each Python file: its characters must be in code page 1252, and it may not choose a device by name, nor
an autocast or a plain layer of torch where ComfyUI has its own.
"""

import ast
import os
import re
import subprocess
import sys

import pytest

from kit.docs import published
from kit.pack import ROOT

CODE_PAGE = "cp1252"
FOLDERS = ("ops", "patcher", "cache", "nodes")
LAYERS = r"(?:Linear|Conv[123]d|ConvTranspose[12]d|LayerNorm|GroupNorm|Embedding)"
REFUSED = {
    "a device by name": (r"\.cuda\s*\(", r"\.to\s*\(\s*(?:torch\.device\s*\(\s*)?[\"']cuda"),
    "torch's autocast": (r"torch\.autocast\s*\(", r"torch\.(?:cuda\.)?amp\.autocast"),
    "a plain layer": (rf"(?<![\w.])(?:torch\.)?nn\.{LAYERS}\s*\(",),
}
MODE = re.compile("[rwxa][bt+]*")
# What the import of a module or a file of texts needs must not hang on the system's code page, nor what is printed.
IN_A_CODE_PAGE = {"PYTHONIOENCODING": CODE_PAGE, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
IMPORT_ALL = """
import importlib, sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module="spillway")
sys.path.insert(0, "tests")
from kit.pack import ROOT
for folder in ("ops", "patcher", "cache"):
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "comfyui" not in parts:
            print(importlib.import_module("spillway." + ".".join(parts)).__doc__)
"""


def archived():
    files = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return [path for path in sorted(files) if published(path)]


def outside_of_the_code_page(source):
    """Name each line with a character that a console of Windows cannot show."""
    for number, line in enumerate(source.splitlines(), 1):
        strange = {char for char in line if not char.encode(CODE_PAGE, "ignore")}
        if strange:
            yield f"{number}: {''.join(sorted(strange))!a}"


def refused(source):
    """Name each line that comfy-test refuses. It passes over lines that are comments, and reads all others as code."""
    for number, line in enumerate(source.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        for why, patterns in REFUSED.items():
            if any(re.search(pattern, line) for pattern in patterns):
                yield f"{number}: {why}"


def without_encoding(source):
    """Name each line that opens a file as text in whatever code page the system has."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or "encoding" in [keyword.arg for keyword in node.keywords]:
            continue
        function = ast.unparse(node.func)
        name = function.rpartition(".")[2]
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
        modes = [mode for mode in modes if MODE.fullmatch(mode)]
        # Whose `open` a method is cannot be read here. One with the mode of a text is a file's.
        opens = function in ("open", "os.fdopen") or (name == "open" and modes)
        if name in ("read_text", "write_text") or (opens and not any("b" in mode for mode in modes)):
            yield f"{node.lineno}: {ast.unparse(node)[:80]}"


RULES = (outside_of_the_code_page, refused, without_encoding)


@pytest.mark.parametrize("rule", RULES)
def test_the_pack_obeys(rule):
    files = archived()
    assert {path.relative_to(ROOT).parts[0] for path in files} >= {"__init__.py", "prestartup_script.py", *FOLDERS}
    found = [
        f"{path.relative_to(ROOT).as_posix()}:{what}"
        for path in files
        for what in rule(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    ("rule", "lines"),
    [
        (outside_of_the_code_page, ["A = 'a wave \N{WATER WAVE}'", "# an arrow \N{RIGHTWARDS ARROW}"]),
        (refused, ["x = x.cuda()", "x.cuda (0)", "'use .cuda() here'", "x.to('cuda:1')", "x.to(torch.device('cuda'))"]),
        (refused, ["with torch.autocast('cpu'):", "torch.cuda.amp.autocast()", "a = nn.Linear(1, 2)"]),
        (
            without_encoding,
            ["open(path)", "open(path, 'w')", "path.read_text()", "path.open('r')", "path.write_text(a)"],
        ),
    ],
)
def test_each_rule_sees_what_it_forbids(rule, lines):
    assert [line for line in lines if not list(rule(line))] == []


def test_each_rule_leaves_alone_what_it_allows():
    allowed = "# x.cuda()\nx.is_cuda(0)\ny = 'caf\N{LATIN SMALL LETTER E WITH ACUTE}'\nother.nn.Linear(1)\n"
    allowed += "open(path, 'rb')\nstore.open(name)\nos.open(path, flags)\npath.read_text(encoding='utf-8')\n"
    assert [list(rule(allowed)) for rule in RULES] == [[], [], []]


def test_the_engine_is_imported_and_printed_in_windows_code_page():
    """An open without an encoding is an error here, in whatever file."""
    ran = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", IMPORT_ALL],
        cwd=ROOT,
        env={**os.environ, **IN_A_CODE_PAGE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout.decode(CODE_PAGE, "replace")[-2000:]
    assert len(ran.stdout.splitlines()) > 200
