"""The oldest frontend that the panel supports, and the newest that there is."""

import subprocess
import sys
import zipfile

import pytest

from kit.comfyui.panel_graph import graph

PACKAGE = "comfyui-frontend-package"


@pytest.fixture(params=["1.43.0", None], ids=["oldest", "newest"])
def frontend(request, tmp_path):
    """The folder of a frontend, out of its wheel."""
    wanted = PACKAGE if request.param is None else f"{PACKAGE}=={request.param}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*command, "-d", str(tmp_path), wanted], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "comfyui_frontend_package" / "static"


@pytest.mark.slow
def test_the_panel_works_in_it(frontend, start, visit, shots):
    with start(["--front-end-root", str(frontend)]) as server:
        page = visit(server)
        page.load(graph())
        ours = page.kinds()
        page.command("Spillway.ConvertBack")
        page.until(lambda: {"UNETLoader", "CLIPLoader", "VAELoader"} <= set(page.kinds().values()), panel=False)
        page.page.get_by_role("button", name="Spillway's loaders").first.click()
        page.until(lambda: page.kinds() == ours, panel=False)
        page.open()
        page.succeed()
        page.until(lambda: "VAE Decode #8" in page.text())
        told = server.get("spillway/memory")
        assert page.until(lambda: told in [state for _, state in page.states])
        page.button("Keep", "flux").click()
        page.until(lambda: "always" in {model.get("keep") for model in server.get("spillway/memory")["models"]})
        shots(page, f"frontend-{frontend.parents[1].name}")
        page.page.keyboard.press("Alt+Shift+U")
        page.until(lambda: not page.is_open, panel=False)
        page.page.wait_for_timeout(1000)
        before = len(page.states)
        page.succeed()
        page.page.wait_for_timeout(1000)
        assert len(page.states) == before and page.icon_number().endswith("%")
        assert page.until(page.badges, panel=False)
        assert page.said == []
        page.page.context.close()
