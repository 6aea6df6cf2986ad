"""Puts LoRAs on models. Unlike ComfyUI's nodes, refuses a LoRA that does not fit and warns of one that fits in part."""

from __future__ import annotations

import logging
import os
from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..patcher.comfyui.patches.lora import apply_lora
from ..patcher.comfyui.progress import Progress
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice
from .load import NONE, file_stamps, model_path

log = logging.getLogger("spillway")

ALIASES = ["lora", "load lora", "apply lora", "lora loader", "lora model"]
SLOTS = 6
CLIP_IN = "The text encoder that the LoRA is also for. Leave it unconnected for LoRAs of the model alone."


def lora_choice() -> io.Input:
    return OpenChoice(
        "lora_name", options=folder_paths.get_filename_list("loras"), tooltip="A LoRA file in models/loras."
    )


def strength_input(name: str, part: str) -> io.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        tooltip=f"How strongly the LoRA changes the {part}. It may be negative. 0 leaves the {part} as it is.",
    )


def stack_inputs() -> list[io.Input]:
    """Make the inputs for what a stack of LoRAs is put on."""
    return [
        io.Model.Input("model", tooltip="A MODEL from any loader."),
        io.Clip.Input("clip", optional=True, tooltip=CLIP_IN.replace("LoRA is", "LoRAs are")),
    ]


def stack_outputs() -> list[io.Output]:
    """Make the outputs of a stack of LoRAs."""
    return [
        io.Model.Output(tooltip="The model with all LoRAs. The one that came in is not changed."),
        io.Clip.Output(tooltip="The text encoder with all LoRAs. Empty if none was connected."),
    ]


def applied(model: Any, clip: Any, loras: list[tuple[str, float, float]]) -> tuple[Any, Any, Any]:
    """Apply each (name, strength for the model, strength for the CLIP). Returns (model, clip, warnings to show)."""
    # Look for all files before reading one. A missing last file would else cost the time of all the others.
    chosen = [(model_path("loras", name), *strengths) for name, *strengths in loras]
    progress = Progress()
    warnings = []
    for number, (path, strength_model, strength_clip) in enumerate(chosen, 1):
        model, clip, fit = apply_lora(model, clip, path, strength_model, strength_clip)
        warning = fit.in_words(os.path.basename(path)) if fit is not None else ""
        if warning:
            log.warning("[Spillway] %s", warning)
            warnings.append(warning)
        if len(chosen) > 1:
            progress(number, len(chosen))
    return model, clip, ui.PreviewText("\n".join(warnings)) if warnings else None


class SpillwayLoraLoader(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoraLoader",
            display_name="Load LoRA (Spillway)",
            category=CATEGORY,
            description="Puts a LoRA on a model and its text encoder. Each weight is computed once, also where it does "
            "not stay on the device. A LoRA made for another kind of model is refused.",
            search_aliases=ALIASES,
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from any loader."),
                io.Clip.Input("clip", optional=True, tooltip=CLIP_IN),
                lora_choice(),
                strength_input("strength_model", "model"),
                strength_input("strength_clip", "text encoder"),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA. The one that came in is not changed."),
                io.Clip.Output(tooltip="The text encoder with the LoRA. Empty if none was connected."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> list[str]:
        return file_stamps("loras", lora_name)

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength_model: float, strength_clip: float, clip: Any = None
    ) -> io.NodeOutput:
        model, clip, shown = applied(model, clip, [(lora_name, strength_model, strength_clip)])
        return io.NodeOutput(model, clip, ui=shown)


class SpillwayLoraLoaderModelOnly(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoraLoaderModelOnly",
            display_name="Load LoRA, Model Only (Spillway)",
            category=CATEGORY,
            description="Puts a LoRA on a model. Each weight is computed once, also where it does not stay on the "
            "device. A LoRA made for another kind of model is refused.",
            search_aliases=[*ALIASES, "lora model only"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from any loader."),
                lora_choice(),
                strength_input("strength_model", "model"),
            ],
            outputs=[io.Model.Output(tooltip="The model with the LoRA. The one that came in is not changed.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> list[str]:
        return file_stamps("loras", lora_name)

    @classmethod
    def execute(cls, model: Any, lora_name: str, strength_model: float) -> io.NodeOutput:
        model, _, shown = applied(model, None, [(lora_name, strength_model, 0.0)])
        return io.NodeOutput(model, ui=shown)


class SpillwayLoraStack(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [NONE, *folder_paths.get_filename_list("loras")]
        slots = []
        for number in range(1, SLOTS + 1):
            slots += [
                OpenChoice(
                    f"lora_{number}",
                    options=files,
                    default=NONE,
                    tooltip=f"LoRA number {number}: a file in models/loras, or 'none'.",
                ),
                io.Float.Input(
                    f"strength_{number}",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip=f"How strongly LoRA {number} changes the model and the text encoder. 0 leaves it out.",
                ),
            ]
        return io.Schema(
            node_id="SpillwayLoraStack",
            display_name="LoRA Stack (Spillway)",
            category=CATEGORY,
            description=f"Puts up to {SLOTS} LoRAs on a model and its text encoder, one after the other. Changing one "
            "computes only the weights again that it changes.",
            search_aliases=[*ALIASES, "lora stack", "multi lora", "several loras", "power lora"],
            inputs=[
                *stack_inputs(),
                *slots,
            ],
            outputs=stack_outputs(),
        )

    @classmethod
    def fingerprint_inputs(cls, **slots: Any) -> list[str]:
        return file_stamps("loras", *(slots.get(f"lora_{number}", NONE) for number in range(1, SLOTS + 1)))

    @classmethod
    def execute(cls, model: Any, clip: Any = None, **slots: Any) -> io.NodeOutput:
        numbers = range(1, SLOTS + 1)
        chosen = [(slots.get(f"lora_{number}", NONE), slots.get(f"strength_{number}", 1.0)) for number in numbers]
        loras = [(name, strength, strength) for name, strength in chosen if name != NONE and strength != 0]
        model, clip, shown = applied(model, clip, loras)
        return io.NodeOutput(model, clip, ui=shown)
