"""Runs the page's modules in node, without a page."""

import json
import shutil
import subprocess

from kit.pack import ROOT
from kit.skips import skip_loudly


def copy_modules(folder, script):
    """Copy the modules, and a script of tests/web, to where node takes them for such, whatever lies above the pack."""
    shutil.copytree(ROOT / "web" / "js", folder / "js")
    shutil.copy(ROOT / "tests" / "web" / script, folder)
    (folder / "package.json").write_text('{"type": "module"}')


def run_script(folder, script, given, *arguments, skipped):
    """Give the script the data, as JSON, and return what it prints. skipped: words for where there is no node."""
    node = shutil.which("node")
    if node is None:
        skip_loudly(skipped)
    done = subprocess.run(
        [node, str(folder / script), str(folder / "js"), *map(str, arguments)],
        input=json.dumps(given),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
