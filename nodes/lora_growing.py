"""A stack of LoRAs that grows with each one that is connected."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .checked_node import CheckedNode
from .inputs import CATEGORY, ChosenLora, LoraType
from .load import file_stamps
from .lora import ALIASES, applied, lora_choice, stack_inputs, stack_outputs, strength_input

MOST = 50
# Versions of ComfyUI without io.Autogrow show this many inputs from the beginning.
FIXED = 12


class SpillwayLora(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLora",
            display_name="LoRA (Spillway)",
            category=CATEGORY,
            description="Chooses a LoRA and its strengths for a Growing LoRA Stack. It reads nothing.",
            search_aliases=["lora", "choose lora", "lora for stack"],
            inputs=[
                lora_choice(),
                strength_input("strength_model", "model"),
                strength_input("strength_clip", "text encoder"),
            ],
            outputs=[LoraType.Output("lora", display_name="lora", tooltip="For a Growing LoRA Stack.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> list[str]:
        return file_stamps("loras", lora_name)

    @classmethod
    def execute(cls, lora_name: str, strength_model: float, strength_clip: float) -> io.NodeOutput:
        return io.NodeOutput(ChosenLora(lora_name, strength_model, strength_clip))


def _slots() -> list[io.Input]:
    """Make the inputs for LoRAs: one that grows, or a fixed number in versions of ComfyUI that have no such input."""
    tooltip = "LoRAs of LoRA (Spillway) nodes, applied in this order."
    autogrow = getattr(io, "Autogrow", None)
    if autogrow is None:
        return [LoraType.Input(f"lora{place}", optional=True, tooltip=tooltip) for place in range(FIXED)]
    one = LoraType.Input("lora", tooltip=tooltip)
    template = autogrow.TemplatePrefix(one, "lora", min=0, max=MOST)
    return [autogrow.Input("loras", template=template, optional=True, tooltip=tooltip)]


class SpillwayGrowingLoraStack(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayGrowingLoraStack",
            display_name="Growing LoRA Stack (Spillway)",
            category=CATEGORY,
            description=f"Puts any number of LoRAs on a model and its text encoder, up to {MOST}. A new input appears "
            f"as soon as the last one is connected; older versions of ComfyUI show {FIXED} inputs instead.",
            search_aliases=[*ALIASES, "lora stack", "growing stack", "multi lora", "several loras"],
            inputs=[
                *stack_inputs(),
                *_slots(),
            ],
            outputs=stack_outputs(),
        )

    @classmethod
    def execute(cls, model: Any, clip: Any = None, loras: Any = None, **fixed: Any) -> io.NodeOutput:
        slots = {**(loras or {}), **fixed}
        chosen = [slots[name] for name in sorted(slots, key=_place) if slots[name] is not None]
        for lora in chosen:
            if not isinstance(lora, ChosenLora):
                raise ValueError(
                    f"Growing LoRA Stack (Spillway): a LoRA is a {type(lora).__name__}; expected a wire of type "
                    "SPILLWAY_LORA. Connect it to a LoRA (Spillway) node."
                )
        wanted = [tuple(lora) for lora in chosen if lora.strength_model or lora.strength_clip]
        model, clip, shown = applied(model, clip, wanted)
        return io.NodeOutput(model, clip, ui=shown)


def _place(name: str) -> int:
    """Give the number at the end of an input's name. Names as text would put the tenth before the second."""
    digits = name[len(name.rstrip("0123456789")) :]
    return int(digits or 0)
