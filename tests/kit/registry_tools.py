"""comfy-cli and comfy-test in a folder of their own, and what they need to run here.

Neither comes near ComfyUI's Python: their versions of common packages are for nobody else.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .environment import HOST_TOOLS, ROOT, cache_tag, digest, stamp, write_stamp
from .skips import skip_loudly

REQUIREMENTS = ROOT / "tests" / "comfyui" / "browser" / "registry.txt"
# Behind all other folders, so that what ComfyUI's Python has comes first: comfy-test runs ComfyUI's code, too.
COMFY_TEST = "import sys; sys.path.append({!r}); from comfy_test.cli import main; sys.exit(main())"
# As playwright names the two forms of its browser on Linux.
BROWSERS = {
    "chromium": "chrome-linux64/chrome",
    "chromium-headless-shell": "chrome-headless-shell-linux64/chrome-headless-shell",
}


def install() -> Path:
    """Return the tools' folder. Where pip cannot have them the test is skipped, and the end of the run says so."""
    folder = HOST_TOOLS / f"registry-{cache_tag(sys.executable)}"
    fingerprint = digest(REQUIREMENTS.read_text(encoding="utf-8"))
    if stamp(folder) == fingerprint:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--target", str(folder)]
    done = subprocess.run([*command, "-r", str(REQUIREMENTS)], capture_output=True, text=True, timeout=600)
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        last = (done.stderr.strip().splitlines() or ["no word of pip's"])[-1]
        skip_loudly(f"comfy-test and comfy-cli on the registry's archive: pip cannot install them ({last})")
    write_stamp(folder, fingerprint)
    return folder


def comfy(tools: Path, home: Path, *arguments: str, cwd: Path) -> str:
    """Run comfy-cli, which must succeed. Returns what it said. It asks nothing and reports nothing to anybody."""
    variables = {**os.environ, "PYTHONPATH": str(tools), "HOME": str(home)}
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=cwd, env=variables, text=True, timeout=120, **streams)
    assert done.returncode == 0, done.stdout
    return done.stdout


def link_browsers(folder: Path, chromium: str) -> None:
    """Lay Chromium of this machine where playwright looks for the one that it would download."""
    import playwright

    listed = Path(playwright.__file__).parent / "driver" / "package" / "browsers.json"
    for browser in json.loads(listed.read_text(encoding="utf-8"))["browsers"]:
        if browser["name"] in BROWSERS:
            named = f"{browser['name'].replace('-', '_')}-{browser['revision']}"
            place = folder / named / BROWSERS[browser["name"]]
            place.parent.mkdir(parents=True)
            os.symlink(chromium, place)


def comfy_test(tools: Path, node: Path, url: str, variables: dict[str, str]) -> subprocess.CompletedProcess:
    """Let comfy-test look at the pack in a folder, on a server that runs."""
    command = [sys.executable, "-c", COMFY_TEST.format(str(tools)), "run", "--server-url", url]
    return subprocess.run(
        command,
        cwd=node,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
    )
