"""Each figure that users read names its machine, command and date and stands in a result, or is arithmetic."""

import functools
import json
import math
import re
import runpy
import statistics
import sys

import pytest

from kit.docs import (
    ARITHMETIC,
    DATE,
    FIGURE,
    HELP,
    MONTHS,
    OTHER_DATE,
    PAGES,
    READMES,
    blocks,
    dates,
    faults_of_pages,
    spoken_for,
    undated,
)
from kit.pack import ROOT

BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
SAID = {
    "en": "A step takes {} (two cores of an AMD EPYC, 26 November 2026, `python dev.py bench card`).",
    "zh": "一步用 {}: 两个 AMD EPYC 核心, 2026 年 11 月 26 日, `python dev.py bench card`。",
    "ja": "一ステップは {} です、AMD EPYC の二コア、2026-11-26、`python dev.py bench card`。",
}
PARTS = ["AMD EPYC", "26 November 2026", "2026 年 11 月 26 日", "2026-11-26", "python dev.py bench card"]
TABLE = "| | ComfyUI | Spillway |\n| --- | --- | --- |\n| a step | 2.5 s | 1.5 s |"


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


# --- a source for each ------------------------------------------------------------------------------------------------


def test_each_figure_names_its_machine_command_and_date():
    assert faults_of_pages() == []


@pytest.mark.parametrize("figure", ["0.5 s", "12 ms", "4,184 MB", "1.17 %", "2.3 times as much", "0.5 秒", "3.6 倍"])
@pytest.mark.parametrize(("language", "part"), [(one, part) for one in SAID for part in PARTS if part in SAID[one]])
def test_a_figure_without_one_of_them_is_found(language, part, figure):
    said = SAID[language].format(figure)
    for page in (READMES[0], HELP[0]):
        assert list(undated(page, said)) == []
        (found,) = undated(page, said.replace(part, ""))
        assert name_of(page) in found and found.count("no ") == 1


@pytest.mark.parametrize(
    "apart",
    [
        "## Speed\n\n{}\n\nIt took 0.5 s.",
        "- {}\n- It took 0.5 s.",
        "{}\n\n## More\n\n" + TABLE,
        "{}\n\nWords.\n\n" + TABLE,
    ],
)
def test_a_source_speaks_for_its_own_paragraph_alone(apart):
    assert len(list(undated(READMES[0], apart.format(SAID["en"].format("1.5 s"))))) == 1


@pytest.mark.parametrize("beside", ["{}\n\n" + TABLE, TABLE + "\n\n{}"])
def test_a_table_has_the_source_of_the_paragraph_beside_it(beside):
    assert list(undated(READMES[0], beside.format(SAID["en"].format("1.5 s")))) == []


def test_texts_of_nodes_and_notes_of_workflows_have_no_figures():
    """They have no room for a source. What was measured stands on the pages. Others translate the English texts."""
    files = [*(ROOT / "locales" / "en").glob("*.json"), *(ROOT / "example_workflows").glob("*.json")]
    texts = {path: list(words(json.loads(text_of(path)))) for path in files}
    assert len(files) > 20 and sum(map(len, texts.values())) > 1000
    assert [(name_of(path), one) for path, found in texts.items() for one in found if FIGURE.search(one)] == []


def words(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from words(one)


# --- results ----------------------------------------------------------------------------------------------------------


def numbers(value):
    """All numbers of a result, medians of those that were measured several times, and a run's steps added up."""
    if isinstance(value, dict):
        for one in value.values():
            yield from numbers(one)
        if isinstance(value.get("steps_s"), list):
            total = value["first_step_s"]
            for step in value["steps_s"]:
                total += step
                yield total
    elif isinstance(value, list):
        for one in value:
            yield from numbers(one)
        rows = [one for one in value if isinstance(one, dict)]
        for key in rows[0] if rows else ():
            measured = [one[key] for one in rows if isinstance(one.get(key), int | float)]
            if measured:
                yield statistics.median(measured)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def results_of(text):
    """The results of what a text names: each benchmark on each of its dates."""
    names = re.findall(r"dev\.py\sbench\s(\w+)", text) + ["check"] * len(re.findall(r"dev\.py\sgpu`", text))
    return [path for name in names for date in dates(text) for path in RESULTS.glob(f"{name}-*{date}.json")]


def stands_in(figure, found):
    """Whether a number of a result is this figure when it is rounded."""
    number, unit = re.match(r"([\d.,]*\d),? ?(\S+)", figure).groups()
    decimals = len(number.partition(".")[2])
    scale = {"ms": 1e3, "MB": 1e-6, "%": 1e2}.get(unit, 1)
    wanted = f"{float(number.replace(',', '')):.{decimals}f}"
    return any(f"{one * factor:.{decimals}f}" == wanted for one in found for factor in {scale, 1})


def measured_blocks(page):
    found = blocks(text_of(page))
    for place, block in enumerate(found):
        source = spoken_for(found, place)
        figures = [figure for figure in FIGURE.findall(re.sub(r"`[^`]*`", "", block)) if figure[0].isdigit()]
        if figures and not ARITHMETIC.search(source) and re.search(r"dev\.py\s(?:bench|gpu)\b", source):
            yield block, source, figures


MEASURED = [(page, *one) for page in (*PAGES, *HELP) for one in measured_blocks(page)]
# How many times as large something is: computed from a result by a test of its own.
RATIOS = ("times", "倍")


@pytest.mark.parametrize(
    ("page", "block", "source", "figures"),
    MEASURED,
    ids=[f"{name_of(one[0])}-{place}" for place, one in enumerate(MEASURED)],
)
def test_a_figure_stands_in_the_result_of_its_benchmark_on_its_date(page, block, source, figures):
    files = results_of(source)
    assert files, f"benchmarks/results has nothing of what is named beside: {block}"
    found = [one for path in files for one in numbers(json.loads(text_of(path)))]
    missing = [figure for figure in figures if not figure.endswith(RATIOS) and not stands_in(figure, found)]
    assert not missing, f"{[path.name for path in files]} have no such number"


def result(name):
    return json.loads(text_of(RESULTS / f"{name}.json"))["results"]


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


def test_a_figure_that_was_never_measured_is_found():
    found = list(numbers(json.loads(text_of(RESULTS / "card-h100-2026-11-26.json"))))
    assert stands_in("5.01 s", found) and stands_in("5.0 s", found)
    assert not stands_in("5.02 s", found) and not stands_in("2.61 s", found)


def test_merging_a_lora_into_rounded_weights_makes_errors_as_many_times_larger_as_the_pages_say():
    rows = result("formats-cpu-2026-11-26")
    larger = {name: row["into file"] / row["beside"] for name, row in rows.items() if "into file" in row}
    four_bits = max(larger.pop(name) for name in ("nvfp4", "w4a8"))
    least, most = f"{min(larger.values()):.1f}", f"{max(larger.values()):.1f}"
    assert f"{least} to {four_bits:.0f} times" in text_of(ROOT / "docs" / "loras.md")
    pages = [page for page in HELP if "QuantiseModel" in name_of(page)]
    assert len(pages) == 3
    for page in pages:
        said = " ".join(text_of(page).split())
        assert re.search(rf"{least}(?: to | 至 |\uff5e){most} (?:times|倍)", said), page
        assert re.search(rf"{four_bits:.0f} (?:times|倍)", said), page


# --- arithmetic -------------------------------------------------------------------------------------------------------


@functools.cache
def table_of(bits):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return runpy.run_path(str(BENCHMARKS / "card_table.py"))["table"](bits)
    finally:
        sys.path.remove(str(BENCHMARKS))


def not_recomputed(text):
    """What is called arithmetic and is not what `bench card_table` prints right below."""
    found = blocks(text)
    for block, below in zip(found, [*found[1:], ""], strict=True):
        if ARITHMETIC.search(block):
            named = re.search(r"`python dev\.py bench card_table(?: --bits (8|16))?`", block)
            if named is None or table_of(int(named[1] or 16)).strip() != below.strip():
                yield block


def test_all_arithmetic_is_recomputed():
    marked = [page for page in (*PAGES, *HELP) for block in blocks(text_of(page)) if ARITHMETIC.search(block)]
    assert {name_of(page) for page in marked} >= {*map(name_of, READMES), "docs/small-cards.md"}
    assert [(name_of(page), block) for page in (*PAGES, *HELP) for block in not_recomputed(text_of(page))] == []


@pytest.mark.parametrize("change", [("18.3", "18.4"), ("card_table", "card_tables"), ("| Wan 14B", "| Wan 15B")])
def test_arithmetic_that_is_wrong_or_that_nobody_computes_is_found(change):
    for readme in READMES:
        assert len(list(not_recomputed(text_of(readme).replace(*change)))) == 1


def test_the_arithmetic_is_right_for_flux():
    """By hand: 11.9 billion numbers of two bytes. 5.5 GB stay on a card of 8, and 18.3 come at 6.3 and 25 GB/s."""
    (row,) = [line for line in table_of(16).splitlines() if line.startswith("| Flux")]
    assert row.split(" | ")[1:4] == ["23.8", "3.5 + 20.3: 3.2 / 0.8 s", "5.5 + 18.3: 2.9 / 0.7 s"]


# --- languages --------------------------------------------------------------------------------------------------------


def said(section):
    """What is the same in every language: numbers, links and code. Dates are written in each one's way."""
    links = sorted(re.findall(r"\]\(([^)]*)\)", section))
    code = sorted({" ".join(one.split()) for one in re.findall(r"`([^`]+)`", section)})
    for pattern in (r"\]\([^)]*\)", DATE, OTHER_DATE, rf"\d{{1,2}} (?:{'|'.join(MONTHS)})|\d+ 月 \d+ 日", r"20\d\d"):
        section = re.sub(pattern, " ", section)
    return (
        links,
        code,
        sorted(set(re.findall(r"(?<![A-Za-z_\d.])\d[\d.,]*\d(?:e-\d+)?|(?<![A-Za-z_\d.])\d(?!\d)", section))),
    )


@pytest.mark.parametrize("readme", READMES[1:], ids=lambda page: page.name)
def test_a_readme_says_in_each_section_what_the_english_one_says(readme):
    def parts(page):
        others = r"\[[^]]*\]\(https://\S*/README(?:\.\w\w)?\.md\)"
        return [said(re.sub(others, "", one)) for one in re.split(r"^## .*$", text_of(page), flags=re.MULTILINE)]

    assert parts(readme) == parts(READMES[0])


@pytest.mark.parametrize("page", [page for page in HELP if page.parent.name == "docs"], ids=lambda page: page.stem)
def test_a_help_page_has_the_same_figures_in_every_language(page):
    english = figures_of(page)
    assert all(figures_of(page.parent / page.stem / f"{one}.md") == english for one in ("zh", "ja"))


def figures_of(page):
    found = FIGURE.findall(re.sub(r"`[^`]*`", "", " ".join(text_of(page).split())))
    return sorted(re.match(r"[\d.,]*", figure)[0] for figure in found)
