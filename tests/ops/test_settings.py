"""Variables and settings that make no sense: named once, with what is accepted, and as good as not set."""

import ast
import json
import logging
import os
import re
import subprocess
import sys

import pytest

from kit.pack import ROOT
from spillway.ops import settings
from spillway.ops.ram import available

JUNK = ["16GB", "0x10", "-1", "nan", "-nan", "inf", "-inf", "1e400", "much", "\0", "💾" * 1000, "[]", "1 2"]
NUMBERS = [one for one in (*settings.VARIABLES, *settings.IN_COMFYUI) if isinstance(one, settings.Number)]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(settings, "_said", set())


def warnings(caplog, name):
    return [record.getMessage() for record in caplog.records if f"] {name} is " in record.getMessage()]


@pytest.mark.parametrize("text", JUNK)
@pytest.mark.parametrize("kind", settings.VARIABLES, ids=lambda kind: kind.name)
def test_a_variable_is_named_once_and_ignored(monkeypatch, caplog, kind, text):
    if "\0" in text:  # no environment can hold it
        monkeypatch.setattr(settings.os, "environ", {kind.name: text})
    else:
        monkeypatch.setenv(kind.name, text)
    assert [settings.variable(kind) for _ in range(3)] == [None] * 3
    (words,) = warnings(caplog, kind.name)
    assert f"expected {kind.expected}" in words and len(words) < 400


@pytest.mark.parametrize("value", [*JUNK, -1, float("nan"), float("inf"), 10**400, {}, [], {"a": 1}, "\ud800"])
@pytest.mark.parametrize("kind", settings.IN_COMFYUI, ids=lambda kind: kind.name)
def test_a_setting_is_named_once_and_ignored(caplog, kind, value):
    assert [settings.setting(kind, {kind.name: value}) for _ in range(3)] == [None] * 3
    (words,) = warnings(caplog, kind.name)
    assert f"expected {kind.expected}" in words and len(words) < 400


@pytest.mark.parametrize("kind", NUMBERS, ids=lambda kind: kind.name)
def test_a_switch_is_no_number(kind):
    assert kind.parse(True) is None and kind.parse("3.5") == kind.parse(3.5) == 3.5
    assert kind.parse(0) == (None if kind is settings.RAM_GB else 0)


def test_what_is_not_set_is_no_word_worth(monkeypatch, caplog):
    for kind in settings.VARIABLES:
        monkeypatch.delenv(kind.name, raising=False)
        assert settings.variable(kind) is None
        monkeypatch.setenv(kind.name, "  ")
        assert settings.variable(kind) is None
    for kind in settings.IN_COMFYUI:
        assert settings.setting(kind, {}) is settings.setting(kind, {kind.name: None}) is None
    assert not caplog.records


@pytest.mark.parametrize("text", [*(text for text in JUNK if "\0" not in text), "0", "1e9"])
def test_the_limit_that_makes_no_sense_is_none(monkeypatch, text):
    monkeypatch.delenv("SPILLWAY_RAM_GB", raising=False)
    wanted = available.total_ram()
    monkeypatch.setenv("SPILLWAY_RAM_GB", text)
    assert available.available_ram().total == available.total_ram() == wanted


def test_the_allocator_is_told_by_the_same_helper():
    """Before torch, and before the pack can be imported."""
    code = (
        "import logging, runpy, sys; logging.basicConfig(); runpy.run_path('prestartup_script.py'); "
        "print('torch' in sys.modules, sys.modules['spillway_allocator'].done)"
    )
    environment = {**os.environ, "SPILLWAY_ALLOCATOR": "maybe"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SPILLWAY_ALLOCATOR is 'maybe'; expected 1 or 0" in done.stderr
    assert done.stdout.startswith("False ") and "SPILLWAY_ALLOCATOR=0" not in done.stdout


def test_no_other_file_reads_a_variable_of_ours():
    """All that the pack reads of the environment by itself are other programs' variables."""
    found = {}
    for folder in ("ops", "patcher", "cache", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            names = {
                node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)
            }
            if names & {"environ", "getenv"}:
                found[path.name] = path.read_text("utf-8")
    assert set(found) == {"settings.py", "allocator.py"}
    assert "environ.get(name)" in found["allocator.py"] and found["allocator.py"].count("environ") == 1


def test_the_settings_page_has_what_the_pack_reads_with_its_english_texts():
    """An id that differs in one place would be a setting without effect."""
    page = (ROOT / "web" / "js" / "settings.js").read_text("utf-8")
    texts = json.loads((ROOT / "locales" / "en" / "settings.json").read_text("utf-8"))
    texts = {name: text for name, text in texts.items() if not name.startswith("Spillway_Panel_")}
    ids = re.findall(r'id: "([^"]+)"', page)
    assert sorted(ids) == sorted(kind.name for kind in settings.IN_COMFYUI)
    assert list(texts) == [name.replace(".", "_") for name in ids]
    assert re.findall(r'\bname: "(.*)",', page)[1:] == [text["name"] for text in texts.values()]
    tooltips = re.findall(r"tooltip:\s+(.*?),\n      category", page, re.S)
    assert ["".join(re.findall(r'"([^"]*)"', words)) for words in tooltips] == [t["tooltip"] for t in texts.values()]


def test_the_panels_own_settings_have_their_english_texts():
    page = (ROOT / "web" / "js" / "memory.js").read_text("utf-8")
    texts = json.loads((ROOT / "locales" / "en" / "settings.json").read_text("utf-8"))
    found = re.findall(r'id: "(Spillway\.Panel\.\w+)",\s+name: "([^"]+)",\s+tooltip:\s+"([^"]+)"', page)
    assert found
    own = {name: text for name, text in texts.items() if name.startswith("Spillway_Panel_")}
    assert {i.replace(".", "_"): {"name": name, "tooltip": words} for i, name, words in found} == own


def test_a_warning_is_logged_as_one(monkeypatch, caplog):
    monkeypatch.setenv("SPILLWAY_CACHE", "perhaps")
    settings.variable(settings.CACHE)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
