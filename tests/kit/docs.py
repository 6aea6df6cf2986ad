"""What is written for users: its links, lengths and figures. Imports the standard library alone, as dev.py does."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

from .environment import ROOT

READMES = [ROOT / name for name in ("README.md", "README.zh.md", "README.ja.md")]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]
HELP = sorted((ROOT / "web" / "docs").rglob("*.md"))  # in every language
REPOSITORY = "https://github.com/spillway-comfy/ComfyUI-Spillway/blob/main/"
MOST_LINES = 130

LINK = re.compile(r"\]\(([^)\s]+)\)")
# Seconds, milliseconds, megabytes and broken percents are measured here, and so is how many times as much something is.
# GB and whole percents are what one sets, too.
FIGURE = re.compile(
    r"(?<![\w.])(?!1024 MB)(?:\d[\d.,]* ?(?:(?:s|ms|MB|times)(?![\w/])|秒|倍)|\d+\.\d+ ?%)"
    r"|(?:a third|half|a quarter|\d[\d.,]*) of (?!the\b)\S+ time\b|的三分之一|三分の一の時間"
)
MONTHS = ("January", "February", "March", "April", "May", "June")
MONTHS += ("July", "August", "September", "October", "November", "December")
DATE = re.compile(rf"(\d{{1,2}}) ({'|'.join(MONTHS)}) (20\d\d)")
OTHER_DATE = re.compile(r"(20\d\d)(?:-| 年 )(\d{1,2})(?:-| 月 )(\d{1,2})")
COMMAND = re.compile(r"`(?:python3?\s)?dev\.py\s[a-z_]+|`tests/")
MACHINE = re.compile(r"\b(?:EPYC|Xeon|H100)\b")
ARITHMETIC = re.compile(r"[Aa]rithmetic,\snot\smeasured|不是测量|測定ではなく計算です")
EVIDENCE = {"machine": MACHINE, "command": COMMAND, "date": re.compile(f"{DATE.pattern}|{OTHER_DATE.pattern}")}
# What a paragraph says that speaks for the one above it, beyond pictures.
ABOVE = re.compile(r"figures above|以上数字|上の数字")


def published(path: Path) -> bool:
    """Say whether the registry's archive has a file of this folder."""
    name = path.relative_to(ROOT).as_posix()
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    rules = [line.strip().removeprefix("/") for line in lines if line.strip() and not line.startswith("#")]
    return not any(name.startswith(rule) if rule.endswith("/") else fnmatch.fnmatch(name, rule) for rule in rules)


def anchors(page: Path) -> set[str]:
    """List the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> Iterator[str]:
    """Name each link of a page that leads nowhere, here or in the registry's archive."""
    for target in LINK.findall(text):
        own = target.startswith(REPOSITORY)
        if target.startswith("http") and not own:
            continue
        name, _, anchor = target.removeprefix(REPOSITORY).partition("#")
        path = (ROOT / name if own else page.parent / name).resolve() if name else page
        where = f"{page.relative_to(ROOT).as_posix()}: {target}"
        if not path.exists():
            yield f"{where}: there is no such file"
        elif anchor and anchor not in anchors(path):
            yield f"{where}: the page has no such heading"
        elif not own and published(page) and not published(path):
            yield f"{where}: the registry's archive has no such file; link to {REPOSITORY}"


def blocks(text: str) -> list[str]:
    """Divide a page into what has to name its source by itself: paragraphs, entries of lists, tables, headings."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        found += re.split(r"\n(?=(?:[-*]|\d+\.) )", block.strip("\n"))
    return [block for block in found if block.strip() and not block.startswith("![")]


def spoken_for(found: list[str], place: int) -> str:
    """Return a block with those that speak for it: a table has the paragraphs around it."""
    block = found[place]
    before, after = found[place - 1 : place], found[place + 1 : place + 2]
    if block.startswith("|"):
        around = [other for other in (*before, *after) if not other.startswith(("#", "|", "- "))]
    elif block.startswith("#"):
        around = []
    else:
        around = [other for other in after if ABOVE.search(other)]
    return "\n".join([block, *around])


def undated(page: Path, text: str) -> Iterator[str]:
    """Name each figure that does not say on what machine, when and how it came about, and is no arithmetic."""
    found = blocks(text)
    for place, block in enumerate(found):
        figures = FIGURE.findall(re.sub(r"`[^`]*`", "", block))
        source = spoken_for(found, place)
        missing = [f"no {what}" for what, pattern in EVIDENCE.items() if not pattern.search(source)]
        if figures and missing and not ARITHMETIC.search(source):
            yield f"{page.relative_to(ROOT).as_posix()}: {block[:60]!r}: {figures[0]} has {' and '.join(missing)}"


def dates(text: str) -> set[str]:
    """Return the dates that a text names, in whatever language, as 2026-11-26."""
    found = {(year, MONTHS.index(month) + 1, day) for day, month, year in DATE.findall(text)}
    return {f"{int(year)}-{int(month):02}-{int(day):02}" for year, month, day in (*found, *OTHER_DATE.findall(text))}


def faults_of_pages() -> list[str]:
    """List what is wrong with the links, figures and length of all pages and help pages."""
    found = []
    for page in (*PAGES, *HELP):
        text = page.read_text(encoding="utf-8")
        found += [*broken_links(page, text), *undated(page, text)]
        lines = len(text.splitlines())
        if page in READMES and lines > MOST_LINES:
            found.append(f"{page.name} has {lines} lines; {MOST_LINES} are two minutes")
    return found
