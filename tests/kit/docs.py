"""What is written for users: its links, lengths and figures. Imports the standard library alone, as dev.py does."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

from .environment import ROOT

READMES = [ROOT / name for name in ("README.md", "README.zh.md", "README.ja.md")]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]
REPOSITORY = "https://github.com/spillway-comfy/ComfyUI-Spillway/blob/main/"
MOST_LINES = 130

LINK = re.compile(r"\]\(([^)\s]+)\)")
# Seconds, milliseconds and megabytes are measured here; GB and percent are what one sets, too.
FIGURE = re.compile(r"(?<![\w.])\d[\d.,]* ?(?:s|ms|MB|秒)(?![\w/])")
DATE = re.compile(r"\d{1,2} [A-Z][a-z]+ 20\d\d")
OTHER_DATE = re.compile(r"\d{4}-\d\d-\d\d|\d{4} 年 \d{1,2} 月 \d{1,2} 日")
COMMAND = re.compile(r"`(?:python3? dev\.py [a-z_]+|tests/)")
ARITHMETIC = re.compile(r"[Aa]rithmetic|算术|計算です")


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


def sections(text: str) -> list[str]:
    """Divide a page at its headings. Code is not part of a heading."""
    return re.split(r"^(?=##? )", text, flags=re.MULTILINE)


def undated(page: Path, text: str) -> Iterator[str]:
    """Name each section with a figure that does not say when and how it came about."""
    for section in sections(text):
        figures = FIGURE.findall(re.sub(r"`[^`]*`", "", section))
        if not figures or ARITHMETIC.search(section):
            continue
        missing = []
        if not DATE.search(section) and not OTHER_DATE.search(section):
            missing.append("no date")
        if not COMMAND.search(section):
            missing.append("no command")
        if missing:
            title = section.splitlines()[0]
            yield f"{page.relative_to(ROOT).as_posix()}: {title}: {figures[0]} has {' and '.join(missing)}"


def faults_of_pages() -> list[str]:
    """List what is wrong with the links, figures and length of all pages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [*broken_links(page, text), *undated(page, text)]
        lines = len(text.splitlines())
        if page in READMES and lines > MOST_LINES:
            found.append(f"{page.name} has {lines} lines; {MOST_LINES} are two minutes")
    return found
