"""`dev.py release` finds what is wrong with a version, its archive, its results and its tests."""

import json
import subprocess
import zipfile

import pytest

from kit import release
from kit.pack import ROOT

PROJECT = '[project]\nname = "spillway"\nversion = "0.2.0"\n'
RELEASED = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-11-26\n\n- Something.\n\n## [0.1.0] - 2026-11-01\n"


def test_this_version_is_one():
    """What waits in the changelog is a fault of a release alone."""
    assert not [fault for fault in release.version_faults() if "[Unreleased] still has" not in fault]
    assert list(release.result_faults()) == []
    assert list(release.version_faults(PROJECT, RELEASED)) == []


@pytest.mark.parametrize(
    ("project", "changelog", "because"),
    [
        (PROJECT.replace("0.2.0", "0.3.0"), RELEASED, "make them equal"),
        (PROJECT, RELEASED.replace("## [0.2.0] - 2026-11-26\n\n- Something.\n\n", ""), "make them equal"),
        (PROJECT, RELEASED.replace("] - 2026-11-26", "]"), "has no date"),
        (PROJECT, RELEASED.replace("[Unreleased]\n", "[Unreleased]\n\n- More.\n"), "still has '- More.'"),
        (PROJECT, "# Changelog\n", "there is no release"),
    ],
)
def test_a_version_that_is_not_ready_is_named(project, changelog, because):
    (found,) = release.version_faults(project, changelog)
    assert because in found


def test_a_workflow_with_another_version_of_the_pack_is_named():
    """Of other packs it may have any. Each workflow here has this one."""
    node = '{{"cnr_id": "{}",\n "ver": "{}"}}'
    texts = {"old.json": node.format("spillway", "0.1.0"), "new.json": node.format("spillway", "0.2.0")}
    (found,) = release.workflow_faults({**texts, "core.json": node.format("comfy-core", "0.22.0")}, "0.2.0")
    assert found == "old.json names version 0.1.0 of the pack; write 0.2.0"
    assert list(release.workflow_faults()) == []


def test_each_version_in_a_workflow_is_looked_at():
    """Blueprints name none, so that the newest is installed for them."""
    for path in (ROOT / "example_workflows").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert len(release.PACK_AND_VERSION.findall(text)) == text.count('"ver": ') > 0, path.name


@pytest.fixture(scope="module")
def files():
    try:
        return release.archive_files()
    except subprocess.CalledProcessError:
        pytest.skip("no git repository here")


def test_the_archive_has_the_pack_and_nothing_else(files):
    assert list(release.archive_faults(files)) == []
    assert not [name for name in files if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.parametrize(
    ("change", "because"),
    [
        (lambda files: [name for name in files if name != "prestartup_script.py"], "lacks prestartup_script.py"),
        (lambda files: [name for name in files if name != "ops/ledger.py"], "lacks ops/ledger.py; add it to git"),
        (lambda files: [name for name in files if not name.startswith("locales/ja/")], "nothing of locales/ja/"),
        (lambda files: [*files, "tests/conftest.py"], "no user needs"),
        (lambda files: [*files, "dev.py"], "no user needs"),
        (lambda files: [*files, "nodes/nowhere.py"], "is no file here"),
    ],
)
def test_an_archive_that_is_not_whole_is_named(files, change, because):
    (found,) = release.archive_faults(change(files))
    assert because in found


def test_the_archive_is_written_as_it_lies_here(files, tmp_path):
    assert release.main(["--archive", str(tmp_path / "pack.zip")]) == 0
    with zipfile.ZipFile(tmp_path / "pack.zip") as archive:
        assert sorted(archive.namelist()) == sorted(files)
        assert archive.read("__init__.py") == (ROOT / "__init__.py").read_bytes()


@pytest.mark.parametrize(
    ("name", "told", "because"),
    [
        ("a-2026-11-25", {"date": "2026-11-26"}, "is of 2026-11-26"),
        ("a-2026-11-26", {"command": ""}, "does not say command"),
        ("a", {}, "no date"),
    ],
)
def test_a_result_without_its_source_is_named(name, told, because, tmp_path):
    head = {"benchmark": "a", "date": "2026-11-26", "command": "python dev.py bench a", "machine": {"cores": 2}}
    (tmp_path / f"{name}.json").write_text(json.dumps({**head, **told}), encoding="utf-8")
    assert because in next(release.result_faults(tmp_path))


def test_tests_must_have_passed_on_this_very_tree(files, monkeypatch, tmp_path):
    monkeypatch.setattr(release, "TESTED", tmp_path / "tested")
    assert "no commit" in next(release.test_faults())
    release.TESTED.write_text("of another tree")
    assert "another commit" in next(release.test_faults())
    monkeypatch.setattr(release, "git", lambda *words: [] if words[0] == "status" else ["a tree"])
    release.note_tested()
    assert list(release.test_faults()) == []
    monkeypatch.setattr(release, "git", lambda *words: [" M dev.py"] if words[0] == "status" else ["another tree"])
    release.note_tested()
    assert "another commit" in next(release.test_faults())


def test_words_that_it_does_not_take_are_refused(capsys):
    assert release.main(["--now"]) == 2
    assert "--untested" in capsys.readouterr().err
