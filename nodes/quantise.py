"""Quantises models that another loader made."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..patcher.comfyui.loading.adopt import quantised_clip, quantised_model
from ..patcher.comfyui.loading.load import CHECKPOINT_DTYPES, TEXT_DTYPES
from .checked_node import CheckedNode
from .inputs import CATEGORY, policy_input


def parts_of(leave_out: str) -> tuple[str, ...]:
    """Return the parts of layers' names that a text lists, with commas or line breaks between them."""
    return tuple(part.strip() for part in leave_out.replace("\n", ",").split(",") if part.strip())


class SpillwayQuantiseModel(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayQuantiseModel",
            display_name="Quantise Model (Spillway)",
            category=CATEGORY,
            description="Quantises a MODEL, a CLIP or both, from any loader, with the LoRAs and patches that they "
            "carry. Each layer is quantised once, when it is first used. What comes in is not changed.",
            search_aliases=["quantize model", "int8", "nvfp4", "mxfp8", "w4a8", "4 bit", "8 bit", "convert fp8"],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="A MODEL from any loader, with or without LoRAs."),
                io.Clip.Input("clip", optional=True, tooltip="A CLIP from any loader."),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(CHECKPOINT_DTYPES),
                    default="auto",
                    tooltip="The number format of the MODEL's large layers. 'auto' takes the most exact with which "
                    "all weights fit, and says why. 'default' quantises nothing.",
                ),
                io.Combo.Input(
                    "clip_dtype",
                    options=list(TEXT_DTYPES),
                    default="auto",
                    tooltip="The number format of the CLIP's large layers. They are dequantised where they are used.",
                ),
                io.String.Input(
                    "leave_out",
                    default="",
                    tooltip="Parts of the names of more layers that keep their numbers, such as 'txt_mlp, 18'. * "
                    "stands for any letters. Embeddings, norms, modulation and the first and last layers are left out "
                    "anyway.",
                ),
                policy_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model and patches, quantised. Empty if none was connected."),
                io.Clip.Output(tooltip="The same CLIP, quantised. Empty if none was connected."),
            ],
        )

    @classmethod
    def execute(
        cls,
        weight_dtype: str,
        clip_dtype: str,
        leave_out: str,
        model: Any = None,
        clip: Any = None,
        policy: Any = None,
    ) -> io.NodeOutput:
        if model is None and clip is None:
            raise ValueError("Quantise Model (Spillway): neither model nor clip is connected. Connect one of them.")
        names, said = parts_of(leave_out), []
        if model is not None:
            model, words = quantised_model(model, weight_dtype, names, policy)
            said.append(words)
        if clip is not None:
            clip, words = quantised_clip(clip, clip_dtype, names, policy)
            said.append(words)
        shown = "\n".join(words for words in said if words)
        return io.NodeOutput(model, clip, ui=ui.PreviewText(shown) if shown else None)
