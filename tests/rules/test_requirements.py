"""What an installation of the pack installs: never another version of what ComfyUI brings."""

import ast
import re

from kit.pack import ROOT

# What ComfyUI 0.22 to 0.33 pin, or choose by the device. Another version breaks ComfyUI, not only the pack.
COMFYUIS = {
    "comfy-aimdo",
    "comfy-angle",
    "comfy-kitchen",
    "comfyui-embedded-docs",
    "comfyui-frontend-package",
    "comfyui-workflow-templates",
    "torch",
    "torchaudio",
    "torchvision",
}


def required():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_project_names_the_same():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (found,) = re.findall(r"^dependencies = (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    assert ast.literal_eval(found) == required()


def test_no_version_is_moved():
    """pip leaves a bare name alone where any version is there; a version, an address or an option may replace it."""
    assert required()
    for line in required():
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", line), f"{line}: give the name alone"
        assert re.sub(r"[-_.]+", "-", line).lower() not in COMFYUIS, f"{line}: ComfyUI brings the version that it needs"
