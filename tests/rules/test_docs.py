"""What is written for users leads somewhere and names what there is."""

import json
import re
import struct

import pytest

from kit.docs import MOST_LINES, PAGES, READMES, anchors, broken_links, faults_of_pages
from kit.pack import ROOT
from spillway.ops import settings

BENCHMARKS = ROOT / "benchmarks"
WORKFLOWS = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
SOURCES = [path for folder in ("ops", "patcher", "cache", "nodes") for path in (ROOT / folder).rglob("*.py")]
PACK = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
DEVELOPERS = (ROOT / "dev.py").read_text(encoding="utf-8") + "".join(
    path.read_text(encoding="utf-8")
    for folder in (BENCHMARKS, ROOT / "tests" / "kit", ROOT / "tests" / "cuda_sim")
    for path in folder.rglob("*.py")
)
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]


@pytest.fixture(params=PAGES, ids=IDS)
def page(request):
    return request.param


def text_of(page):
    return page.read_text(encoding="utf-8")


# --- links, lengths, dates --------------------------------------------------------------------------------------------


def test_links_lead_somewhere_and_two_minutes_are_enough():
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
        for option in required_options(name):
            assert option in words.split(), f"{command} {name} does not run without {option}"
    for path in re.findall(r"`((?:tests|benchmarks)/[\w/.]+)`", text_of(page)):
        assert (ROOT / path).exists(), path


def required_options(benchmark):
    """The options without which a benchmark ends at once."""
    source = text_of(BENCHMARKS / f"{benchmark}.py") if benchmark else ""
    return re.findall(r'add_argument\("(--[a-z-]+)"[^\n]*required=True', source)


def test_values_of_variables_are_ones_that_are_taken(page):
    """Those that a page gives to the pack's variables, in code; what makes no sense would be ignored."""
    options = {option.name: option for option in settings.VARIABLES}
    given = re.findall(r"`(SPILLWAY_[A-Z_]+)=([^`\n]+)`", text_of(page))
    if page.name == "remote-models.md":
        given += [
            ("SPILLWAY_REMOTE", value)
            for value in re.findall(r"^\| `(?!SPILLWAY)([^`]+)` \|", text_of(page), re.MULTILINE)
        ]
        assert len(given) > 3
    for name, value in given:
        assert options[name].parse(value) is not None, f"{name}={value}: expected {options[name].expected}"


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


def test_settings_are_those_of_the_pages(page):
    """Each path that a page in English gives through ComfyUI's settings ends at one of them, or at their group."""
    shown = json.loads((ROOT / "locales" / "en" / "settings.json").read_text(encoding="utf-8"))
    names = {entry["name"] for entry in shown.values()} | {key.split("_")[1] for key in shown} | {"Spillway"}
    paths = re.findall(r"\*Settings > (Spillway[^*]*)\*", text_of(page).replace("\n", " "))
    assert paths or page != READMES[0]
    if page not in READMES[1:]:
        assert [path for path in paths if path.split(" > ")[-1].strip() not in names] == []
