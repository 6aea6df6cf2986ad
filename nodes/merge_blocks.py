"""Merges two models of one architecture with a slider for each block. One node for each architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from comfy_api.latest import io

from ..patcher.comfyui.merge import CURVES, block_of_keys, merge
from .checked_node import CheckedNode
from .inputs import CATEGORY


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}.{index}" for index in range(count)]


def _u_net(blocks: int) -> list[str]:
    return [
        "time_embed",
        "label_emb",
        *_numbered("input_blocks", blocks),
        *_numbered("middle_block", 3),
        *_numbered("output_blocks", blocks),
        "out",
    ]


FLUX = [
    *("img_in", "time_in", "guidance_in", "vector_in", "txt_in"),
    *_numbered("double_blocks", 19),
    *_numbered("single_blocks", 38),
    "final_layer",
]
OTHER = "other"


class _BlockMerge(CheckedNode):
    """A node with a slider for each block. blocks: their names in the model. kind: the architecture in words."""

    blocks: ClassVar[Sequence[str]]
    kind: ClassVar[str]

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=cls.__name__,
            display_name=f"Merge Blocks, {cls.kind} (Spillway)",
            category=CATEGORY,
            description=f"Merges two models of {cls.kind} with a slider for each block. Nothing is computed here: each "
            "weight is merged when it is used or saved, so no more memory is taken than by one model.",
            search_aliases=["block merge", "merge block weighted", "mbw", "merge models", f"merge {cls.kind.lower()}"],
            inputs=[
                io.Model.Input("model1", tooltip=f"The first MODEL, of {cls.kind}."),
                io.Model.Input("model2", tooltip="The second MODEL, of the same architecture."),
                io.Combo.Input(
                    "curve",
                    options=list(CURVES),
                    default="linear",
                    tooltip="linear: the sliders are the shares. sigmoid: they matter most near 0.5. inverse sigmoid: "
                    "they matter most near 0 and 1.",
                ),
                *(
                    io.Float.Input(
                        name, default=0.5, min=0.0, max=1.0, step=0.01, tooltip=f"The share of model2 in {words}."
                    )
                    for name, words in [*((b, f"the weights of {b}") for b in cls.blocks), (OTHER, "all other weights")]
                ),
            ],
            outputs=[io.Model.Output(tooltip="The merged MODEL, for samplers, LoRA nodes and save nodes.")],
        )

    @classmethod
    def merged(cls, model1: Any, model2: Any, curve: str, **given: float) -> io.NodeOutput:
        shares = {name: CURVES[curve](share) for name, share in given.items()}
        block_of = block_of_keys(cls.blocks)
        return io.NodeOutput(merge([model1, model2], shares, group=lambda key: block_of(key) or OTHER))


class SpillwayMergeBlocksSD15(_BlockMerge):
    blocks, kind = _u_net(12), "SD 1.5"

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return cls.merged(**given)


class SpillwayMergeBlocksSDXL(_BlockMerge):
    blocks, kind = _u_net(9), "SDXL"

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return cls.merged(**given)


class SpillwayMergeBlocksFlux(_BlockMerge):
    blocks, kind = FLUX, "Flux"

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:
        return cls.merged(**given)


BLOCK_MERGES: list[type[io.ComfyNode]] = [
    SpillwayMergeBlocksSD15,
    SpillwayMergeBlocksSDXL,
    SpillwayMergeBlocksFlux,
]
