"""Tests the device that ComfyUI computes on."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import comfy.model_management
import comfyui_version
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..ops.device.backend import backend_for
from ..patcher.comfyui.device import device_names
from ..patcher.comfyui.first_use import record_file
from ..patcher.comfyui.kitchen import register_kitchen
from ..patcher.self_test import in_lines, self_test
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice

log = logging.getLogger("spillway")

CURRENT = "current"
ROOM = 1 << 30  # bytes that the test needs at most


class SpillwaySelfTest(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwaySelfTest",
            display_name="Self Test (Spillway)",
            category=CATEGORY,
            description="Tests a device in a few seconds, without any file: transfers, VBAR and quantised products, "
            "and a small model at 100, 50 and 0 % of its memory, which must give the bits of the plain module.",
            search_aliases=[
                "gpu test",
                "check gpu",
                "diagnose",
                "wrong image",
                "black image",
                "bug report",
                "benchmark",
            ],
            inputs=[
                OpenChoice(
                    "device",
                    options=[CURRENT, *device_names()],
                    tooltip="The device to test. 'current' is the one that ComfyUI computes on.",
                )
            ],
            outputs=[
                io.String.Output("report", tooltip="What was found, for Preview as Text. Paste it into an issue."),
                io.String.Output("json_path", tooltip="The file that holds all of it as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: str) -> float:
        """Run at every prompt: another driver may be there."""
        return float("nan")

    @classmethod
    def execute(cls, device: str) -> io.NodeOutput:
        if device not in (CURRENT, *device_names()):
            raise ValueError(f"Self Test: there is no device '{device}' here. There are: {', '.join(device_names())}.")
        chosen = comfy.model_management.get_torch_device() if device == CURRENT else torch.device(device)
        comfy.model_management.free_memory(ROOM, chosen)
        register_kitchen()
        found = self_test(
            backend_for(chosen), record_file(), stop=comfy.model_management.throw_exception_if_processing_interrupted
        )
        found["comfyui"] = comfyui_version.__version__
        path = _write(found)
        words = f"{in_lines(found)}\n{path}"
        log.log(logging.INFO if found["ok"] else logging.WARNING, "[Spillway] self test: %s", words)
        return io.NodeOutput(words, str(path), ui=ui.PreviewText(words))


def _write(found: dict) -> Path:
    folder = Path(folder_paths.get_user_directory()) / "__spillway"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"self_test-{re.sub('[^a-z0-9]', '-', found['device'])}.json"
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return path
