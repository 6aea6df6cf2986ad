"""The registry's own tools on the archive that it would serve: `comfy node pack`, `comfy node validate` and comfy-test.

Nothing is downloaded while they run. SPILLWAY_PACKS may name a folder with ComfyUI-validate-endpoint, which comfy-test
asks for; a pack of ours stands in for it else.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kit import registry_tools, release
from kit.comfyui.running_server import Server
from kit.find_comfyui import find_comfyui
from kit.pack import ROOT

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the folders of playwright's browser are those of Linux"
)

ENDPOINT = "ComfyUI-validate-endpoint"
STAND_IN = ROOT / "tests" / "kit" / "comfyui" / "validate_endpoint"
# What comfy-test runs where a pack names none, and what else its file names.
DEFAULT = {"SYNTAX", "INSTALL", "REGISTRATION", "INSTANTIATION", "STATIC_CAPTURE", "VALIDATION", "EXECUTION"}


@pytest.fixture(scope="module")
def tools():
    return registry_tools.install()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What is tracked, as it lies here, in a repository of its own, for comfy-cli writes where it runs."""
    folder = tmp_path_factory.mktemp("tree")
    for name in release.git("ls-files"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A", "-f"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


@pytest.fixture(scope="module")
def packed(tools, tree, tmp_path_factory):
    """The archive that `comfy node pack` makes."""
    registry_tools.comfy(tools, tmp_path_factory.mktemp("home"), "node", "pack", cwd=tree)
    (archive,) = tree.glob("*.zip")
    return archive


def test_the_archive_is_that_of_comfy_node_pack(packed, tmp_path):
    assert release.write_archive(tmp_path / "ours.zip") == 0
    with zipfile.ZipFile(packed) as theirs, zipfile.ZipFile(tmp_path / "ours.zip") as ours:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        assert [name for name in ours.namelist() if ours.read(name) != theirs.read(name)] == []


def test_comfy_node_validate_has_nothing_to_say(tools, tree, tmp_path):
    told = registry_tools.comfy(tools, tmp_path, "node", "validate", cwd=tree)
    assert "passed" in told and "warning" not in told.lower(), told


@pytest.fixture(scope="module")
def comfyui(packed, tmp_path_factory):
    """A folder like ComfyUI's with the archive in its custom_nodes, where a user's Manager would unpack it."""
    base = tmp_path_factory.mktemp("comfyui")
    for name in ("logs", "custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir()
    for path in find_comfyui().iterdir():  # comfy-test imports ComfyUI from here, too
        if not (base / path.name).exists():
            os.symlink(path, base / path.name)
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(base / "custom_nodes" / "spillway")
    real = Path(os.environ.get("SPILLWAY_PACKS", "")) / ENDPOINT
    os.symlink(real if real.is_dir() else STAND_IN, base / "custom_nodes" / ENDPOINT)
    return base


def test_comfy_test_passes_on_the_archive(tools, comfyui, browser, tmp_path):
    registry_tools.link_browsers(tmp_path / "browsers", os.environ["SPILLWAY_CHROMIUM"])
    variables = {"PLAYWRIGHT_BROWSERS_PATH": str(tmp_path / "browsers"), "COMFY_TEST_LOGS_DIR": str(comfyui / "logs")}
    with Server(comfyui, log="logs/server.log") as server:
        url = f"http://127.0.0.1:{server.port}"
        done = registry_tools.comfy_test(tools, comfyui / "custom_nodes" / "spillway", url, variables)
    assert done.returncode == 0, done.stdout
    assert DEFAULT | {"JAVASCRIPT"} == set(re.findall(r"^\[([A-Z_]+)\] PASSED$", done.stdout, re.MULTILINE))
    assert re.search(r"^No import errors detected$", done.stdout, re.MULTILINE), done.stdout
    (results,) = (comfyui / "logs").rglob("results.json")
    told = json.loads(results.read_text(encoding="utf-8"))
    assert [(run["name"], run["status"]) for run in told["workflows"]] == [("self_test", "pass")]
