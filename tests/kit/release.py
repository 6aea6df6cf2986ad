"""`dev.py release`: says what must still be true before a version is tagged. It changes nothing and needs no network.

Imports the standard library alone, as dev.py does.
"""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .docs import faults_of_pages, published
from .environment import ROOT, VENV, fail, say

TESTED = VENV / "spillway-tested"  # the tree of the last commit on which a whole `dev.py test` passed
USAGE = "release takes --untested, --archive FILE or nothing"
PACKAGES = ("ops", "patcher", "cache", "nodes")
NEEDED = ("__init__.py", "prestartup_script.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md")
SERVED = ("web/js", "web/docs", "web/images", "locales/en", "locales/zh", "locales/ja", "docs")
SERVED += ("example_workflows", "subgraphs", "workflows/tests")
WORKFLOWS = ("example_workflows", "subgraphs", "workflows")
PACK_AND_VERSION = re.compile(r'"cnr_id": "([\w-]+)",\s+"ver": "([\w.]+)"')
MOST_BYTES = 2_000_000  # of a file in the archive
RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\](?: - (\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def main(arguments: list[str]) -> int:
    """Check everything, name all that is wrong, and write the archive where that is asked for."""
    if arguments[:1] == ["--archive"] and len(arguments) == 2:
        return write_archive(Path(arguments[1]))
    if arguments not in ([], ["--untested"]):
        return fail(f"{USAGE}, not {' '.join(arguments)!r}.", 2)
    checks: dict[str, Callable[[], Iterator[str]]] = {
        "versions and changelog": version_faults,
        "versions in workflows": workflow_faults,
        "the archive": archive_faults,
        "pages: links, lengths, dates of figures": lambda: iter(faults_of_pages()),
        "results of benchmarks": result_faults,
        "the working tree": tree_faults,
    }
    if not arguments:
        checks["tests"] = test_faults
    count = 0
    for title, check in checks.items():
        found = list(check())
        say(f"{title}: {'all right' if not found else f'{len(found)} to mend'}")
        for fault in found:
            fail(fault)
        count += len(found)
    return int(count > 0)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def version(project: str) -> str:
    found = re.search(r'^version = "(.*)"$', project, re.MULTILINE)
    return found[1] if found else ""


def version_faults(project: str | None = None, changelog: str | None = None) -> Iterator[str]:
    """Compare the project's version with the changelog's newest, which has a date and takes all that was written."""
    ours = version(project or read("pyproject.toml"))
    changelog = changelog or read("CHANGELOG.md")
    newest = RELEASE.search(changelog)
    if newest is None:
        yield "CHANGELOG.md: there is no release; write '## [X.Y.Z] - YYYY-MM-DD'"
        return
    if newest[1] != ours:
        yield f"pyproject.toml has version {ours!r}, the newest in CHANGELOG.md is {newest[1]!r}; make them equal"
    if newest[2] is None:
        yield f"CHANGELOG.md: [{newest[1]}] has no date; write '## [{newest[1]}] - YYYY-MM-DD'"
    waiting = changelog[: newest.start()].partition("## [Unreleased]")[2].strip()
    if waiting:
        yield f"CHANGELOG.md: [Unreleased] still has {waiting.splitlines()[0]!r}; move it to [{newest[1]}]"


def workflow_faults(found: dict[str, str] | None = None, ours: str = "") -> Iterator[str]:
    """Say which workflows name a version of the pack that is not this one, which the Manager would install for them."""
    if found is None:
        paths = (path for folder in WORKFLOWS for path in sorted((ROOT / folder).rglob("*.json")))
        found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    ours = ours or version(read("pyproject.toml"))
    for name, text in found.items():
        others = {one for pack, one in PACK_AND_VERSION.findall(text) if pack == "spillway" and one != ours}
        if others:
            yield f"{name} names version {', '.join(sorted(others))} of the pack; write {ours}"


def archive_files() -> list[str]:
    """List what `comfy node pack` takes: the tracked files that .comfyignore does not name."""
    return [name for name in git("ls-files") if published(ROOT / name)]


def archive_faults(files: list[str] | None = None) -> Iterator[str]:
    """Say what the archive lacks of the pack, and what it has that a user needs not."""
    files = archive_files() if files is None else files
    has = set(files)
    for name in NEEDED:
        if name not in has:
            yield f"the archive lacks {name}"
    for folder in SERVED:
        if not any(name.startswith(f"{folder}/") for name in files):
            yield f"the archive has nothing of {folder}/"
    for package in PACKAGES:
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        for name in sorted(there - has):
            yield f"the archive lacks {name}; add it to git"
    for name in files:
        path = ROOT / name
        if name.startswith(("tests/", "benchmarks/", ".github/", ".ci/")) or name == "dev.py":
            yield f"the archive has {name}, which no user needs; name it in .comfyignore"
        elif path.is_symlink() or not path.is_file():
            yield f"{name} is no file here"
        elif path.stat().st_size > MOST_BYTES:
            yield f"{name} has {path.stat().st_size:,} bytes; the archive takes {MOST_BYTES:,} of a file"


def write_archive(target: Path) -> int:
    """Write the archive, with each file as it lies here."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in archive_files():
            archive.write(ROOT / name, name)
    say(f"wrote {target}")
    return 0


def result_faults(folder: Path = ROOT / "benchmarks" / "results") -> Iterator[str]:
    """Say which results of benchmarks have another date than their name, or no machine or command."""
    for path in sorted(folder.glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        day = path.stem[-10:]
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            yield f"{path.name}: its name has no date at its end"
        if not isinstance(told, dict) or "benchmark" not in told:
            continue  # rows or a check, which have no such head
        missing = [key for key in ("date", "command", "machine") if not told.get(key)]
        if missing:
            yield f"{path.name} does not say {' and '.join(missing)}"
        elif told["date"] != day:
            yield f"{path.name} is of {told['date']}; name it so"


def tree_faults() -> Iterator[str]:
    """Say what is not committed, and whether the version has been given to another commit."""
    changed = git("status", "--porcelain", "--untracked-files=no")
    if changed:
        yield f"{len(changed)} files differ from the commit, such as {changed[0][3:]}; commit them"
    tag = f"v{version(read('pyproject.toml'))}"
    if tag in git("tag") and git("rev-parse", f"{tag}^{{commit}}") != git("rev-parse", "HEAD"):
        yield f"the tag {tag} is on another commit; choose another version"


def test_faults() -> Iterator[str]:
    tree = git("rev-parse", "HEAD^{tree}")[0]
    noted = TESTED.read_text(encoding="utf-8").strip() if TESTED.is_file() else ""
    if noted != tree:
        when = "another commit" if noted else "no commit"
        yield f"a whole `dev.py test` has passed on {when}, not on this one; run it (--untested leaves this out)"


def note_tested() -> None:
    """Note that a whole run of the tests has passed, where what ran is what is committed."""
    try:
        if not git("status", "--porcelain", "--untracked-files=no"):
            TESTED.write_text(git("rev-parse", "HEAD^{tree}")[0], encoding="utf-8")
    except (OSError, subprocess.CalledProcessError):
        return  # no git here, as in an archive: nobody makes a release of that
