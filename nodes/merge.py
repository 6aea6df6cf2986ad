"""Merges models without holding them in memory."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patcher.comfyui.merge import CURVES, GROUPS, merge
from .checked_node import CheckedNode
from .inputs import CATEGORY

SUM, DIFFERENCE = "weighted sum", "add difference"
# Sums whose shares follow another curve.
CURVED = ("sigmoid", "inverse sigmoid")
AS_RATIO = -1.0


def _ratio(name: str, default: float, tooltip: str, least: float = 0.0, optional: bool = False) -> io.Input:
    return io.Float.Input(name, default=default, min=least, max=1.0, step=0.01, tooltip=tooltip, optional=optional)


def _share(name: str, tooltip: str) -> io.Input:
    return _ratio(name, AS_RATIO, f"{tooltip} -1 takes the value of ratio.", least=AS_RATIO)


class SpillwayMergeModels(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayMergeModels",
            display_name="Merge Models (Spillway)",
            category=CATEGORY,
            description="Merges two or three models of one architecture. Nothing is computed here: each weight is "
            "merged when it is used or saved, so no more memory is taken than by one model.",
            search_aliases=[
                "merge models",
                "model merge",
                "weighted sum",
                "add difference",
                "sigmoid",
                "block merge",
                "mix",
            ],
            inputs=[
                io.Model.Input("model1", tooltip="The first MODEL. Settings that are no weights are taken from it."),
                io.Model.Input("model2", tooltip="The second MODEL, of the same architecture."),
                io.Combo.Input(
                    "mode",
                    options=[SUM, DIFFERENCE, *CURVED],
                    default=SUM,
                    tooltip="weighted sum: a mixture. add difference: model1, and on top ratio times what model2 has "
                    "over model3. sigmoid: a mixture whose ratio matters most near 0.5. inverse sigmoid: one whose "
                    "ratio matters most near 0 and 1.",
                ),
                _ratio(
                    "ratio",
                    0.5,
                    "The share of model2. 0 gives model1, 1 gives model2. With add difference, the factor.",
                ),
                io.Model.Input("model3", optional=True, tooltip="A third MODEL. Needed for add difference."),
                _ratio(
                    "ratio3",
                    0.0,
                    "The share of model3 in a weighted sum. With add difference it has no meaning.",
                    optional=True,
                ),
                _share("early", "The ratio for the first third of the blocks; of a U-Net, its input blocks."),
                _share("middle", "The ratio for the second third of the blocks; of a U-Net, its middle block."),
                _share("late", "The ratio for the last third of the blocks; of a U-Net, its output blocks."),
                _share("other", "The ratio for everything outside of the blocks, such as embeddings."),
            ],
            outputs=[io.Model.Output(tooltip="The merged MODEL, for samplers, LoRA nodes and save nodes.")],
        )

    @classmethod
    def execute(
        cls,
        model1: Any,
        model2: Any,
        mode: str,
        ratio: float,
        early: float,
        middle: float,
        late: float,
        other: float,
        model3: Any = None,
        ratio3: float = 0.0,
    ) -> io.NodeOutput:
        given = dict(zip(GROUPS, (early, middle, late, other), strict=True))
        shares = {group: ratio if value < 0 else value for group, value in given.items()}
        if mode in CURVED:
            shares = {group: CURVES[mode](share) for group, share in shares.items()}
            ratio3 = CURVES[mode](ratio3)
        models = [model for model in (model1, model2, model3) if model is not None]
        if mode != DIFFERENCE and model3 is not None and max(shares.values()) + ratio3 > 1.0:
            raise ValueError(
                f"Merge Models: the shares of model2 ({max(shares.values()):g}) and model3 ({ratio3:g}) are together "
                "more than 1, which would leave less than nothing of model1. Lower one of them."
            )
        return io.NodeOutput(merge(models, shares, ratio3, add_difference=mode == DIFFERENCE))
