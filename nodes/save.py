"""Saves models as they are used, LoRAs and all, and the difference of two models, tensor by tensor."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..patcher.comfyui.progress import Progress
from ..patcher.comfyui.saving.extract_lora import save_lora
from ..patcher.comfyui.saving.save import AS_LOADED, DTYPES, SAVE_DTYPES, Saved, save_model
from ..patcher.comfyui.saving.target import checkpoint_target, journal, next_name, workflow_metadata
from .checked_node import CheckedNode
from .inputs import CATEGORY

log = logging.getLogger("spillway")


def report(saved: Saved) -> io.NodeOutput:
    """Return the path. The node and the log say what was written."""
    log.info("[Spillway] saved %s", saved.words)
    return io.NodeOutput(str(saved.path), ui=ui.PreviewText(saved.words))


def prefix_input(default: str) -> io.Input:
    """Make the input for the name to save under."""
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip="Folder and name in ComfyUI's output folder. A number is added, so no file is ever replaced.",
    )


def dtype_input() -> io.Input:
    """Make the input for the number format to save in."""
    return io.Combo.Input(
        "dtype",
        options=SAVE_DTYPES,
        default=AS_LOADED,
        tooltip="'as loaded' keeps what the file had, quantisation included. bf16 and fp16 take 2 bytes for a number, "
        "fp32 takes 4. fp8, mxfp8 and int8 halve a 16-bit model, w4a8 and nvfp4 quarter it: its large repeated layers "
        "are quantised, the rest is as loaded.",
    )


def path_output() -> io.Output:
    """Make the output for the path of the file."""
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
            search_aliases=[
                "save model",
                "export model",
                "bake lora",
                "model save",
                "quantize model",
                "convert fp8",
                "nvfp4",
                "mxfp8",
            ],
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


class SpillwaySaveLora(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwaySaveLora",
            display_name="Extract and Save LoRA (Spillway)",
            category=CATEGORY,
            description="Saves the difference of two models as a LoRA of a rank that you choose. It works weight by "
            "weight and holds neither model in memory.",
            search_aliases=["extract lora", "save lora", "export lora", "model difference", "lora from model", "svd"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that the LoRA is to lead to, with whatever patches it has."),
                io.Model.Input("base", tooltip="The MODEL that the LoRA will be used with."),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=4096,
                    tooltip="How much of the difference the LoRA can hold. A higher rank is nearer, and a larger file.",
                ),
                prefix_input("loras/Spillway"),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    tooltip="The number format of the file. Most LoRAs are in fp16 or bf16.",
                ),
            ],
            outputs=[path_output()],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, base: Any, rank: int, filename_prefix: str, dtype: str = "fp16") -> io.NodeOutput:
        hidden = cls.hidden
        metadata = workflow_metadata(getattr(hidden, "prompt", None), getattr(hidden, "extra_pnginfo", None))
        return report(
            save_lora(
                next_name(filename_prefix),
                model,
                base,
                rank,
                dtype=dtype,
                metadata=metadata,
                progress=Progress(),
                journal=journal(),
            )
        )
