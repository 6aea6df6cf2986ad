"""ComfyUI's own requirements: all that the pack requires is there already, in the version that ComfyUI asks for."""

import re

from kit.comfyui.start import COMFYUI, ROOT


def names(path):
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in lines if line}


def test_comfyui_brings_all():
    ours = names(ROOT / "requirements.txt")
    assert ours and ours <= names(COMFYUI / "requirements.txt")
