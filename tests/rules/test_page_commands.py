"""A command, route, flag, variable or graph that a page names is run by something, and the table says by what."""

import ast
import json
import re

import pytest

from kit.docs import HELP, PAGES
from kit.pack import ROOT
from kit.page_commands import (
    COMFYUIS,
    ELSEWHERE,
    NODES_OF_COMFYUI,
    NOT_HERE,
    RUN,
    VARIABLE,
    VARIABLES,
    WORKFLOW,
    commands_of,
)

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in (*PAGES, *HELP)}
KNOWN = [*RUN, *ELSEWHERE, *NOT_HERE]
RUN_BY = {*(entry.where for entry in ELSEWHERE.values()), *VARIABLES.values(), *NODES_OF_COMFYUI.values()}
WORKFLOWS = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
RAN = ROOT / "tests" / "comfyui" / "server" / "test_example_workflows.py"


def not_run(text):
    return commands_of(text) - set(KNOWN)


@pytest.mark.parametrize("page", TEXTS)
def test_each_command_of_a_page_is_run_by_something(page):
    assert not_run(TEXTS[page]) == set(), "add it to tests/kit/page_commands.py, with what runs it"


@pytest.mark.parametrize(
    "added",
    [
        "Run `python dev.py bench nothing`.",
        "Run `python3 dev.py demo --size 1`.",
        "Then:\n\n    python dev.py gpu --only nothing\n    cd ..\n",
        "Then:\n\n    cd custom_nodes\n",
        "```bash\nls /models\n```\n",
        "```\ncurl -s http://127.0.0.1:8188/spillway/nothing\n```\n",
        '```json\n{"prompt": {}}\n```\n',
        "```python\nimport torch\n```\n",
        "Ask `GET /spillway/nothing`.",
        'Send `{"models": 1}`.',
        "Start it with `--lowvram`.",
        "`docker compose up`",
        "`SPILLWAY_CACHE=0 python main.py`",
    ],
)
def test_a_command_that_nobody_runs_is_found(added):
    for text in TEXTS.values():
        assert not_run(text + "\n\n" + added), added


def test_nothing_in_the_table_is_on_no_page():
    found = set().union(*map(commands_of, TEXTS.values()))
    assert set(KNOWN) - found == set()
    assert len(KNOWN) == len(set(KNOWN)), "each in one table"


def exists(where):
    """Whether a test, or a line of CI, is there."""
    path, _, line = where.partition(": ")
    if line:
        return line in (ROOT / path).read_text(encoding="utf-8")
    path, _, name = where.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(one, ast.FunctionDef) and one.name == name and not is_left_out(one) for one in tree.body)


def is_left_out(function):
    """Whether a plain run leaves a test out: it has a mark `slow` or `skip` of its own."""
    return any(mark in ast.unparse(one) for one in function.decorator_list for mark in ("mark.slow", "mark.skip("))


@pytest.mark.parametrize("where", sorted(RUN_BY))
def test_what_is_said_to_run_a_command_is_there(where):
    assert exists(where)


def test_a_test_that_is_gone_is_found():
    assert not exists("tests/rules/test_page_commands.py::test_nothing")
    assert not exists(".ci/run: python3 dev.py nothing")


def test_each_variable_of_the_pages_is_set_by_a_test():
    named = set().union(*(VARIABLE.findall(text) for text in TEXTS.values()))
    types = json.loads((ROOT / "locales" / "en" / "main.json").read_text(encoding="utf-8"))["dataTypes"]
    assert named - set(types) == set(VARIABLES)


def test_what_is_said_of_comfyuis_nodes_is_tested():
    named = set().union(*(COMFYUIS.findall(text) for text in TEXTS.values()))
    assert named == set(NODES_OF_COMFYUI)


@pytest.mark.parametrize("page", TEXTS)
def test_each_graph_of_a_page_is_one_that_runs(page):
    """All of the folder run, by their names there, on a real server."""
    assert "def test_a_workflow_runs_in_short" in RAN.read_text(encoding="utf-8")
    inputs = set(re.findall(r"^- \*\*(\w+)\*\*", TEXTS[page], re.MULTILINE))
    assert set(WORKFLOW.findall(TEXTS[page])) - inputs <= WORKFLOWS


@pytest.mark.parametrize("page", [page for page in HELP if page.parent.name == "docs"], ids=lambda page: page.stem)
def test_a_help_page_names_a_graph_that_has_its_node(page):
    named = set(WORKFLOW.findall(page.read_text(encoding="utf-8"))) & WORKFLOWS
    graphs = [json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8")) for name in named]
    assert any(page.stem in {node["type"] for node in graph["nodes"]} for graph in graphs)
