"""Two servers, one on the CPU and one on the fake device, and a Chromium that looks at them."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from kit.comfyui.panel_graph import FLUX
from kit.comfyui.panel_page import ARGUMENTS, Page
from kit.comfyui.running_server import Server
from kit.skips import skip_loudly


@pytest.fixture(scope="session")
def models(tmp_path_factory, checkpoint):
    """Put the files of the graph into a folder of models."""
    folder = tmp_path_factory.mktemp("panel")
    files = {
        "diffusion_models/flux": checkpoint("flux", **FLUX),
        "text_encoders/clip": checkpoint("clip_l"),
        "vae/ae": checkpoint("flux_vae"),
    }
    for name, path in files.items():
        (folder / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path, folder / "models" / f"{name}.safetensors")
    return folder / "models"


@pytest.fixture(scope="session")
def start(tmp_path_factory, models):
    """``start(on_device=True)``: a context of a server that has the models, and a user who knows ComfyUI."""

    def make(arguments=(), on_device=False):
        base = tmp_path_factory.mktemp("server")
        os.symlink(models, base / "models", target_is_directory=True)
        (base / "user" / "default").mkdir(parents=True)
        (base / "user" / "default" / "comfy.settings.json").write_text(
            '{"Comfy.TutorialCompleted": true, "Comfy.Locale": "en"}'
        )
        return Server(base, arguments, on_device=on_device)

    return make


@pytest.fixture(scope="session")
def servers(start):
    """``servers("device")``: the server on the fake device, or on the "cpu". Started once."""
    with ExitStack() as running:
        known = {}

        def server(where):
            if where not in known:
                known[where] = running.enter_context(start(on_device=where == "device"))
            return known[where]

        yield server


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("SPILLWAY_CHROMIUM")
    if not chromium:
        skip_loudly("the tests of the panel in a browser: run them with dev.py test --only browser")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def visit(browser):
    """``visit(server, height=...)``: a page of the server. Closes with the browser."""

    def make(server, width=1400, height=1000):
        context = browser.new_context(
            viewport={"width": width, "height": height},
            permissions=["clipboard-read", "clipboard-write"],
        )
        return Page(context, server)

    return make


@pytest.fixture(scope="session")
def shots():
    """``shots(page, name)``: keep a picture of the panel where SPILLWAY_SHOTS names a folder."""
    folder = os.environ.get("SPILLWAY_SHOTS")

    def keep(page, name):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.page.screenshot(path=str(Path(folder) / f"{name}.png"))

    return keep
