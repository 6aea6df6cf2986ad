"""Save nodes: models as they are used, LoRAs and all, written tensor by tensor."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io, ui

from ..patcher.comfy_save import AS_LOADED, SAVE_DTYPES, Saved, save_model
from ..patcher.comfy_save_target import checkpoint_target, journal
from .inputs import CheckedNode
from .types import CATEGORY

log = logging.getLogger("spillway")


class Progress:
    """ComfyUI's progress bar in bytes, and its stop button."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)


def report(saved: Saved) -> io.NodeOutput:
    """The path, and for the log and the node what was written."""
    log.info("[Spillway] saved %s", saved.words)
    return io.NodeOutput(str(saved.path), ui=ui.PreviewText(saved.words))


def prefix_input(default: str) -> io.Input:
    """The name under which to save."""
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip="Folder and name in ComfyUI's output folder. A number is added, so no file is ever replaced.",
    )


def dtype_input() -> io.Input:
    """The number format to save in."""
    return io.Combo.Input(
        "dtype",
        options=SAVE_DTYPES,
        default=AS_LOADED,
        tooltip="'as loaded' keeps what the file had, quantisation included. bf16 and fp16 take 2 bytes for a number, "
        "fp32 takes 4. fp8 and int8 halve a 16-bit model: its repeated layers are quantised, the rest is as loaded.",
    )


def path_output() -> io.Output:
    return io.String.Output("path", tooltip="The path of the file that was written.")


class SpillwaySaveDiffusionModel(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwaySaveDiffusionModel",
            display_name="Save Diffusion Model (Spillway)",
            category=CATEGORY,
            description="Saves a MODEL with the LoRAs, merges and other patches that it carries. Each weight is "
            "patched when it is written, so it takes hardly any memory.",
            search_aliases=["save model", "export model", "bake lora", "model save", "quantize model", "convert fp8"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to save, from any loader, with whatever patches it has."),
                prefix_input("diffusion_models/Spillway"),
                dtype_input(),
            ],
            outputs=[path_output()],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, dtype: str = AS_LOADED) -> io.NodeOutput:
        return _save(cls, filename_prefix, dtype, model)


class SpillwaySaveCheckpoint(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwaySaveCheckpoint",
            display_name="Save Checkpoint (Spillway)",
            category=CATEGORY,
            description="Saves a MODEL with its CLIP and VAE as one checkpoint, with the LoRAs and other patches that "
            "they carry. Each weight is patched when it is written, so it takes hardly any memory.",
            search_aliases=["save checkpoint", "export checkpoint", "checkpoint save", "merge save", "bake lora"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to save, from any loader, with whatever patches it has."),
                io.Clip.Input("clip", tooltip="The CLIP to save with it."),
                io.Vae.Input("vae", tooltip="The VAE to save with it."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="A CLIP vision model to save with it."),
                prefix_input("checkpoints/Spillway"),
                dtype_input(),
            ],
            outputs=[path_output()],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        filename_prefix: str,
        dtype: str = AS_LOADED,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        return _save(cls, filename_prefix, dtype, model, clip, vae, clip_vision)


def _save(node: Any, prefix: str, dtype: str, model: Any, *others: Any) -> io.NodeOutput:
    hidden = node.hidden
    target = checkpoint_target(model, prefix, getattr(hidden, "prompt", None), getattr(hidden, "extra_pnginfo", None))
    return report(
        save_model(
            target.path,
            model,
            *others,
            dtype=dtype,
            metadata=target.metadata,
            extra=target.extra,
            progress=Progress(),
            journal=journal(),
        )
    )
