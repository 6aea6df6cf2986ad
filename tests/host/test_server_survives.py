"""What must never take a ComfyUI server down: settings, files and prompts that make no sense."""

import json

import pytest
from running_server import Server, node

from spillway.ops import settings


def simple(text="a"):
    """A prompt that needs no model, and is new for each text."""
    return {
        "image": node("EmptyImage", width=8, height=8, batch_size=1, color=7),
        "report": node("SpillwayMemoryReport", value=["image", 0]),
        "save": node("SaveImage", images=["image", 0], filename_prefix=text),
    }


def settings_file(base, text):
    path = base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_variables_and_settings_that_make_no_sense(tmp_path):
    variables = {kind.name: "16GB" for kind in settings.VARIABLES}
    settings_file(tmp_path, json.dumps({kind.name: "nonsense" for kind in settings.IN_COMFYUI}))
    with Server(tmp_path, **variables) as running:
        assert len(running.pictures(simple())) == 1
        assert len(running.pictures(simple("b"))) == 1
        for kind in (*settings.VARIABLES, *settings.IN_COMFYUI):
            value = "16GB" if kind in settings.VARIABLES else "nonsense"
            assert running.said().count(f"{kind.name} is '{value}'; expected {kind.expected}. It is ignored.") == 1


@pytest.mark.parametrize("text", ["{ damaged", "[" * 100_000, "[1]", '{"Spillway.Cache.DiskGB": NaN}'], ids=range(4))
def test_settings_files_that_cannot_be_read(monkeypatch, tmp_path, caplog, text):
    import folder_paths

    from spillway.cache import comfy_settings

    monkeypatch.setattr(settings, "_said", set())
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    settings_file(tmp_path, text)
    for _ in range(3):
        assert comfy_settings.disk_gigabytes() == 0.0 and comfy_settings.disk_seconds() == 10.0
        assert comfy_settings.cache_turned_off() is None
    assert len(caplog.records) == 1
