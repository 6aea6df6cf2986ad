"""The node that saves the difference of two models as a LoRA."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patcher.comfy_extract import save_lora
from ..patcher.comfy_save import DTYPES
from ..patcher.comfy_save_target import journal, next_name, workflow_metadata
from .inputs import CheckedNode
from .save import Progress, path_output, prefix_input, report
from .types import CATEGORY


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
