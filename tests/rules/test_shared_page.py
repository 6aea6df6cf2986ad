"""The browser's page and its names belong to all packs: what comfy-test's rules ask of the panel and the pack."""

import re

import pytest

from kit.pack import ROOT

SCRIPTS = sorted((ROOT / "web" / "js").rglob("*.js"))
SHARED = re.compile(
    r"document\.(?:body|head)\.(?:append|prepend|appendChild)\b|document\.addEventListener|(?:window|globalThis)\.\w+ ="
)
LAYERS = re.compile(r"(?<![\w.])(?:torch\.)?nn\.(?:Linear|Conv[123]d|LayerNorm|GroupNorm|Embedding)\s*\(")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_put_into_the_page_that_is_everybodys(path):
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if SHARED.search(line)]
    assert not found, "keep elements in the panel and listeners on what the pack owns"


def test_extensions_have_the_packs_name():
    """In small letters: comfy-test makes the name of pyproject's DisplayName."""
    names = [
        name
        for path in SCRIPTS
        for name in re.findall(r'registerExtension\(\{\s*name: "([^"]+)"', path.read_text(encoding="utf-8"))
    ]
    assert len(names) >= 2 and all(name.startswith("spillway.") for name in names)


def test_no_layer_is_made_with_torch_where_a_reader_would_take_it_for_a_models():
    for folder in ("ops", "patcher", "cache", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            found = LAYERS.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"
