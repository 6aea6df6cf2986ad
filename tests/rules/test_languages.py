"""What users read is there in every language: nodes, settings, commands, the panel and help pages."""

import re

import pytest

from kit.locales import flat, texts
from kit.pack import ROOT

LANGUAGES = ("zh", "ja")
FILES = ("main", "commands", "settings", "nodeDefs")
PAGES = sorted((ROOT / "web" / "docs").glob("*.md"))
# Chinese is written in Han characters. Japanese has kana in every sentence, but not in every label.
LETTERS = {"zh": re.compile(r"[\u4e00-\u9fff]"), "ja": re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]")}
SENTENCE = {"zh": re.compile(r"[\u4e00-\u9fff]"), "ja": re.compile(r"[\u3040-\u30ff]")}
# Names, which are the same in every language, and what a text puts in place of others.
STAY = {"Spillway", "LoRA", "VAE", "CLIP", "CLIP Vision", "ControlNet", "JSON", "VBAR", "RAM", "{words}", "{most}"}
STAY |= {
    "{most}/255",
    "{widget}\uff1a{value}",
    "{part} / {whole}",
    *"\u3002\uff0c\u3001\uff1b",
    *(f"LoRA {number}" for number in range(1, 7)),
    "LoRA (Spillway)",
}
LAYER = re.compile(r"(\w+_blocks?|label|time|guidance|vector|img|txt|final|out)(_\w+)?(\.\d+)?\.?")
TITLES = {"zh": ["输入", "输出", "示例", "出错时"], "ja": ["入力", "出力", "例", "うまくいかないとき"]}
# What is written as it is: code, what a program says, addresses, names of nodes and flags.
AS_IT_IS = re.compile(r"""`[^`]*`|"[^"]*"|'[^']*'|\{\w+\}|\S*[/_]\S*|--[\w-]+|\*[A-Za-z][^*]*\*""")
ENGLISH = re.compile(r"(?:\b[A-Za-z][A-Za-z'-]*\b[ ,]+){4,}")


def left_in_english(text, language):
    """What of a text nobody translated."""
    if text in STAY or LAYER.fullmatch(text):
        return None
    if not LETTERS[language].search(text):
        return text
    found = ENGLISH.search(AS_IT_IS.sub(" ", text))
    return found[0] if found else None


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", FILES)
def test_no_text_is_missing_or_left_in_english(language, name):
    english, other = dict(flat(texts("en", name))), dict(flat(texts(language, name)))
    assert list(other) == list(english)
    left = {key: found for key, text in other.items() if (found := left_in_english(text, language))}
    assert left == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_names_what_the_english_one_names(language):
    """Choices and names in quotes, and what stands in braces: a translation of them would name nothing."""
    for name in FILES:
        english, other = dict(flat(texts("en", name))), dict(flat(texts(language, name)))
        for key, text in english.items():
            for pattern in (r"\{\w+\}", r"models/\w+", r"SPILLWAY_\w+", r"--[a-z-]+"):
                assert sorted(re.findall(pattern, text)) == sorted(re.findall(pattern, other[key])), (name, key)
            quoted = {one for one in re.findall(r"'([^']+)'", text) if " " not in one.strip() or one.islower()}
            missing = [one for one in quoted if f"'{one}'" not in other[key]]
            assert not missing or "'s" in text, (name, key, missing)


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_each_group_of_settings_has_a_name(language):
    code = "".join((ROOT / "web" / "js" / name).read_text(encoding="utf-8") for name in ("memory.js", "settings.js"))
    groups = {one for words in re.findall(r"category: \[(.+?)\]", code) for one in re.findall(r'"(.+?)"', words)[:2]}
    assert groups and set(texts(language, "main")["settingsCategories"]) == groups


def test_english_left_in_a_text_is_seen():
    assert left_in_english("Takes effect with the next prompt.", "zh")
    assert left_in_english("重启后生效。 Takes effect with the next prompt.", "zh")
    assert left_in_english("権重", "zh") is None and left_in_english("double_blocks.3.", "ja") is None
    assert left_in_english('信息 "there is no device here at all" 和 `python dev.py gpu`。', "zh") is None


# --- help pages -------------------------------------------------------------------------------------------------------


def sections(page):
    """(title of the page, {title of a section: its text})."""
    first, *rest = page.read_text(encoding="utf-8").split("\n## ")
    return first.splitlines()[0].removeprefix("# "), {one.partition("\n")[0]: one.partition("\n")[2] for one in rest}


def entries(section):
    return re.findall(r"^- \*\*(.+?)\*\*[ \uff08]", section, re.MULTILINE)


def messages(section):
    return [one for line in section.splitlines() for one in re.findall(r'"(.+?)"', line)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_help_page_is_whole_in_every_language(page, language):
    translated = page.parent / page.stem / f"{language}.md"
    title, parts = sections(translated)
    _, english = sections(page)
    assert title == texts(language, "nodeDefs")[page.stem]["display_name"]
    assert list(parts) == TITLES[language]
    for ours, theirs in list(zip(parts.values(), english.values(), strict=True))[:2]:
        assert entries(ours) == entries(theirs)
    # What an input or output is given or gives, as it is typed: values, folders, files.
    for ours, theirs in list(zip(parts.values(), english.values(), strict=True))[:2]:
        code = {" ".join(one.split()) for one in re.findall(r"`([^`]+)`", theirs)}
        assert [one for one in sorted(code) if one not in ours] == []
    text, original = translated.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    workflows = r"\*\*([a-z0-9]+(?:_[a-z0-9]+)+)\*\*"
    names = {path.stem for path in (ROOT / "example_workflows").glob("*.json")}
    assert set(re.findall(workflows, text)) & names == set(re.findall(workflows, original)) & names
    missing = set(messages(english["When it fails"])) - set(messages(parts[TITLES[language][3]]))
    assert missing == set(), "what the program says, and the page explains"
    lines = text.splitlines()[1:]
    bare = [line for line in lines if len(line) > 12 and not LETTERS[language].search(line)]
    assert bare == []
    for line in lines:
        found = ENGLISH.search(AS_IT_IS.sub(" ", re.sub(r"\*\*[^*]+\*\*|\[[^]]*\]\([^)]*\)", " ", line)))
        assert found is None, line
    prose = [line for line in lines if len(line) > 60]
    assert all(SENTENCE[language].search(line) for line in prose)


def test_there_is_no_translated_page_without_an_english_one():
    folders = {path.name for path in (ROOT / "web" / "docs").iterdir() if path.is_dir()}
    assert folders == {page.stem for page in PAGES}
    for folder in folders:
        assert {path.name for path in (ROOT / "web" / "docs" / folder).iterdir()} == {f"{one}.md" for one in LANGUAGES}
