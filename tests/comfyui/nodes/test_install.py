"""Installing the pack into ComfyUI's Python installs nothing and moves no version."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from kit.pack import ROOT

# Looking for the module pip has setuptools leave distutils to it, and torch's inductor wants it of setuptools.
PIP = next(importlib.metadata.distributions(name="pip"), None)
pytestmark = pytest.mark.skipif(PIP is None, reason="ComfyUI's Python has no pip")


def dry_run(requirements):
    """What pip would install. Without an index whatever is not there already, or in another version, is an error."""
    options = ["--dry-run", "--no-index", "--quiet", "--disable-pip-version-check", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", *options, "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    return (json.loads(done.stdout)["install"], "") if done.returncode == 0 else (None, done.stderr)


def test_comfyui_has_all_that_the_pack_needs_and_keeps_its_versions():
    planned, why = dry_run(ROOT / "requirements.txt")
    assert planned == [], why or "pip would install these"


def test_a_version_that_is_moved_is_seen(tmp_path):
    """The numbers of versions that none of these packages has."""
    for name in (ROOT / "requirements.txt").read_text(encoding="utf-8").split():
        (tmp_path / "requirements.txt").write_text(f"{name}==0.0.1\n", encoding="utf-8")
        planned, why = dry_run(tmp_path / "requirements.txt")
        assert planned is None and f"{name}==0.0.1" in why
