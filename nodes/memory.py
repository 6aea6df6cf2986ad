"""Moves models by hand, and reports what memory is used for."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..cache.comfyui.models import model_bytes, patcher_of
from ..ops.ledger import in_words
from ..patcher.comfyui import device as devices
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice
from .memory_report import in_lines, memory_report, residency_picture

LOAD, UNLOAD, DROP, MOVE = "load now", "unload to RAM", "drop RAM and pins too", "move to device"
KEEP_DEVICE = "as it is"


class SpillwayDeviceControl(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayDeviceControl",
            display_name="Device Control (Spillway)",
            category=CATEGORY,
            description="Loads, unloads or moves the models that pass through it, at this point of the graph, and "
            "says how many bytes that freed or took.",
            search_aliases=["unload model", "free vram", "purge vram", "load to gpu", "move model", "set device"],
            inputs=[
                io.Combo.Input(
                    "action",
                    options=[LOAD, UNLOAD, DROP, MOVE],
                    default=UNLOAD,
                    tooltip="load now: brings a model onto its device before it is used. unload to RAM: takes it off "
                    "the device. drop RAM and pins too: a Spillway model is read from its file when it is next used. "
                    "move to device: from here on it runs on the device chosen below.",
                ),
                OpenChoice(
                    "device",
                    options=[KEEP_DEVICE, *devices.device_names()],
                    default=KEEP_DEVICE,
                    tooltip="For 'move to device': where the models are to run.",
                ),
                io.Model.Input("model", optional=True, tooltip="A MODEL from any loader."),
                io.Clip.Input("clip", optional=True, tooltip="A CLIP from any loader."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE from any loader."),
                io.AnyType.Input(
                    "after", optional=True, tooltip="Anything. The models are handled once this is there."
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, on another device where it was moved. Empty if none came in."),
                io.Clip.Output(tooltip="The CLIP. Empty if none came in."),
                io.Vae.Output(tooltip="The VAE. Empty if none came in."),
                io.AnyType.Output("after_out", display_name="after", tooltip="What came in at 'after'."),
                io.String.Output("report", display_name="report", tooltip="The bytes of each model before and after."),
            ],
        )

    @classmethod
    def execute(
        cls, action: str, device: str, model: Any = None, clip: Any = None, vae: Any = None, after: Any = None
    ) -> io.NodeOutput:
        if model is None and clip is None and vae is None:
            raise ValueError("Device Control (Spillway): connect 'model', 'clip' or 'vae'; there is nothing to handle.")
        if action == MOVE and device == KEEP_DEVICE:
            raise ValueError("Device Control (Spillway): choose the device that the models are to move to.")
        lines, handled = [], []
        for value, move in (
            (model, devices.moved),
            (clip, devices.moved_clip),
            (vae, devices.moved_vae),
        ):
            patcher = patcher_of(value)
            if value is None or patcher is None:
                handled.append(value)
                continue
            before, note = model_bytes(patcher), None
            if action == MOVE:
                value = move(value, device)
                patcher = patcher_of(value)
            elif action == LOAD:
                devices.load_now(patcher)
            elif action == UNLOAD:
                devices.unload(patcher)
            else:
                note = devices.drop(patcher)
            handled.append(value)
            lines.append(_line(patcher, action, before, note))
        return io.NodeOutput(*handled, after, "\n".join(lines))


def _line(patcher: Any, action: str, before: dict[str, int], note: str | None) -> str:
    after = model_bytes(patcher)
    changes = ", ".join(f"{place} {in_words(before[place])} -> {in_words(after[place])}" for place in before)
    words = f"{type(patcher.model).__name__} on {patcher.load_device}, {action}: {changes}"
    return f"{words} ({note})" if note else words


class SpillwayMemoryReport(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayMemoryReport",
            display_name="Memory Report (Spillway)",
            category=CATEGORY,
            description="Says what memory is used for when this point of the graph is reached: bytes of each model by "
            "place, the largest cached outputs, the last decisions and their reasons.",
            search_aliases=["vram usage", "ram usage", "memory usage", "show memory", "debug memory", "residency"],
            is_output_node=True,
            inputs=[
                io.AnyType.Input("value", tooltip="Anything. The report is made once this is there."),
            ],
            outputs=[
                io.AnyType.Output("value_out", display_name="value", tooltip="What came in."),
                io.String.Output("report", display_name="report", tooltip="The report as text."),
                io.Image.Output(
                    "picture",
                    display_name="picture",
                    tooltip="For each Spillway model a bar of its layers in the order in which they run: bright ones "
                    "are on the device.",
                ),
            ],
        )

    @classmethod
    def execute(cls, value: Any) -> io.NodeOutput:
        report = memory_report()
        text = in_lines(report)
        return io.NodeOutput(value, text, residency_picture(report["models"]), ui={"text": [text]})
