"""What is written for users leads somewhere, names what there is, and says where its figures come from."""

import json
import math
import re
import runpy
import struct
import sys

import pytest

from kit.docs import MOST_LINES, PAGES, READMES, anchors, broken_links, faults_of_pages, undated
from kit.pack import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
WORKFLOWS = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
SOURCES = [path for folder in ("ops", "patcher", "cache", "nodes") for path in (ROOT / folder).rglob("*.py")]
PACK = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
DEVELOPERS = (ROOT / "dev.py").read_text(encoding="utf-8") + "".join(
    path.read_text(encoding="utf-8")
    for folder in (BENCHMARKS, ROOT / "tests" / "kit", ROOT / "tests" / "cuda_sim")
    for path in folder.rglob("*.py")
)
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


@pytest.fixture(params=PAGES, ids=IDS)
def page(request):
    return request.param


def text_of(page):
    return page.read_text(encoding="utf-8")


# --- links, lengths, dates --------------------------------------------------------------------------------------------


def test_links_lead_somewhere_figures_are_dated_and_two_minutes_are_enough():
    assert faults_of_pages() == []


@pytest.mark.parametrize(
    ("link", "because"),
    [
        ("docs/nowhere.md", "no such file"),
        ("docs/nodes.md#nowhere", "no such heading"),
        ("#nowhere", "no such heading"),
        ("benchmarks/README.md", "the registry's archive has no such file"),
        ("CONTRIBUTING.md", "the registry's archive has no such file"),
        ("https://github.com/spillway-comfy/ComfyUI-Spillway/blob/main/docs/nowhere.md", "no such file"),
    ],
)
def test_a_broken_link_is_found(link, because):
    (found,) = broken_links(READMES[0], f"See [this]({link}).")
    assert because in found


def test_a_figure_without_a_source_is_found():
    said = "## Speed\n\nA step takes 0.5 s"
    dated = f"{said} (an H100, 26 November 2026, `python dev.py bench card`)."
    assert len(list(undated(READMES[0], f"{said}."))) == 1
    assert len(list(undated(READMES[0], dated.replace("`", "")))) == 1
    assert len(list(undated(READMES[0], dated.replace("26 November 2026, ", "")))) == 1
    assert list(undated(READMES[0], dated)) == []


def test_every_page_is_linked_from_each_readme():
    for readme in READMES:
        missing = [page.name for page in PAGES if page not in READMES and f"(docs/{page.name}" not in text_of(readme)]
        others = [other.name for other in READMES if other != readme and f"/{other.name})" not in text_of(readme)]
        assert not missing + others, readme.name
        assert len(text_of(readme).splitlines()) <= MOST_LINES
    assert len(anchors(READMES[0])) >= 6


def test_the_registrys_pictures_are_there_in_its_sizes():
    """The addresses are those of the repository, and each picture lies here as SVG too."""
    project = text_of(ROOT / "pyproject.toml")
    (repository,) = re.findall(r'^Repository = "https://github.com/(.+)"$', project, re.MULTILINE)
    raw = f"https://raw.githubusercontent.com/{repository}/main/"
    for key, fits in (
        ("Icon", lambda wide, high: (wide, high) == (400, 400)),
        ("Banner", lambda w, h: w * 9 == h * 21),
    ):
        (address,) = re.findall(rf'^{key} = "(.+)"$', project, re.MULTILINE)
        assert address.startswith(raw), key
        path = ROOT / address.removeprefix(raw)
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG") and fits(*struct.unpack(">II", head[16:24])), path.name
        assert text_of(path.with_suffix(".svg")).startswith("<svg ") and "<text" not in text_of(
            path.with_suffix(".svg")
        )
    for readme in READMES:
        assert "](web/images/banner.png)" in "".join(text_of(readme).splitlines(True)[:4]), readme.name


# --- what is named ----------------------------------------------------------------------------------------------------


def test_commands_exist(page):
    """Each command of dev.py, each benchmark and each of their options."""
    commands = set(re.findall(r'"([a-z]+)": [a-z_]+', (ROOT / "dev.py").read_text(encoding="utf-8")))
    for command, words in re.findall(r"dev\.py ([a-z]+)([^`\n|#]*)", text_of(page)):
        assert command in commands, f"dev.py has no command {command}"
        name = words.split()[0] if command == "bench" and words.split() else None
        assert name is None or (BENCHMARKS / f"{name}.py").is_file(), f"there is no benchmark {name}"
        for option in re.findall(r"--[a-z][a-z-]+", words):
            assert f'"{option}"' in DEVELOPERS, f"{command} {name or ''}: there is no {option}"
    for path in re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", text_of(page)):
        assert (ROOT / path).exists(), path


def test_workflows_exist(page):
    named = re.findall(r"\*\*([a-z0-9]+(?:_[a-z0-9]+)+)\*\*", text_of(page))
    assert set(named) <= WORKFLOWS


def test_nodes_variables_and_routes_exist(page):
    text = text_of(page)
    nodes = set(re.findall(r"(?<=\*)([A-Z][A-Za-z0-9, ]*?) \(Spillway\)(?=\*)", text))
    if page.name == "nodes.md":
        nodes |= {name for row in re.findall(r"^\| (.+?) \|", text, re.MULTILINE) for name in shown_in(row)}
    for name in nodes:
        assert f'"{name} (Spillway)"' in PACK or f'"{name}"' in PACK, f"there is no node {name}"
    for variable in set(re.findall(r"SPILLWAY_[A-Z_]+", text)):
        assert f'"{variable}"' in PACK or variable in DEVELOPERS, f"nobody reads {variable}"
    for route in set(re.findall(r"/spillway/[a-z]+", text)):
        assert f'"{route}"' in PACK, f"there is no route {route}"


def shown_in(row):
    """The names of nodes in the first cell of a row, whole: those with a comma in them are left to the help pages."""
    name = row.removesuffix(" (Spillway)")
    return [] if "," in name or name in ("Node", "---") else [name]


def test_settings_are_those_of_the_page():
    settings = json.loads((ROOT / "locales" / "en" / "settings.json").read_text(encoding="utf-8"))
    names = {entry["name"] for entry in settings.values()}
    assert "Use Spillway's output cache" in names
    assert "Use Spillway's output cache" in text_of(READMES[0]).replace("\n", " ")


# --- figures ----------------------------------------------------------------------------------------------------------


def table_of(bits):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "card_table.py"))["table"](bits)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("bits", "pages"), [(16, READMES), (8, [ROOT / "docs" / "small-cards.md"])], ids=["16", "8"])
def test_the_arithmetic_is_recomputed(bits, pages):
    table = table_of(bits)
    for page in pages:
        assert table in text_of(page), f"{page.name}: paste what `dev.py bench card_table --bits {bits}` prints"


def test_the_arithmetic_is_right_for_flux():
    """By hand: 11.9 billion numbers of two bytes. 5.5 GB stay on a card of 8, and 18.3 come at 6.3 and 25 GB/s."""
    (row,) = [line for line in table_of(16).splitlines() if line.startswith("| Flux")]
    assert row.split(" | ")[1:4] == ["23.8", "3.5 + 20.3: 3.2 / 0.8 s", "5.5 + 18.3: 2.9 / 0.7 s"]


def test_the_readmes_figures_are_those_of_the_results():
    card, before = (result(f"card-h100-{name}2026-11-26") for name in ("", "before-"))
    theirs, ours = "ComfyUI, dynamic VRAM", ("Spillway, dynamic VRAM", "Spillway, without")
    first = [f"{card[name]['first_step_s']:.2f}" for name in (theirs, ours[0])]
    began = [f"{step:.1f}" for step in card[ours[0]]["steps_s"][:2]]
    seven = [f"{card[name]['first_step_s'] + sum(card[name]['steps_s'][:6]):.1f}" for name in (ours[0], theirs)]

    def steps(names):
        found = [run[name]["step_s"] for run in (card, before) for name in names if name in run]
        return f"{min(found):.2f}", f"{max(found):.2f}"

    saved, formats = result("save_model-cpu-2026-11-23"), result("formats-cpu-2026-11-26")["nvfp4"]
    grown = [f"{saved[name]['peak_growth_bytes'] / 1e6:,.0f} MB" for name in ("core ModelSave", "Spillway")]
    errors = [f"{formats[name]:.1e}".replace("e-0", "e-") for name in ("into file", "beside file")]
    graphs = result("compile_step-cpu-2026-11-23")["core, TorchCompileModel"]["script_graphs"]["wider"]
    for readme in READMES:
        text = text_of(readme)
        for figure in (*first, *grown, *errors, f"| {graphs} ", *began, *seven, *steps([theirs]), *steps(ours)):
            assert figure in text, f"{readme.name}: {figure} is nowhere"
    assert all(math.isclose(before[name]["max_abs_difference"], 0) for name in (*ours,))
