"""What walks through a prompt in API format have in common: nodes, widgets, policies and LoRAs on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from comfy_execution.graph_utils import is_link

from ..ops.errors import SpillwayError
from ..patcher.comfyui.forecast.sketch import Loaded
from ..patcher.policy import Policy
from .graph_policy import POLICY_NODE, RULES_NODE, policy_of
from .load import NONE, model_path
from .lora import SLOTS

Node = dict[str, Any]
MOST_STEPS = 200  # of one walk: a graph may go round in a circle
ONE_LORA = ("SpillwayLoraLoader", "SpillwayLoraLoaderModelOnly", "LoraLoader", "LoraLoaderModelOnly")
LORAS = (*ONE_LORA, "SpillwayLoraStack", "SpillwayGrowingLoraStack")


class NotForeseen(SpillwayError, ValueError):
    """Says why nothing can be foreseen. code: what to say of it; values: for its words."""

    def __init__(self, code: str, **values: str) -> None:
        super().__init__(code)
        self.code, self.values = code, values


@dataclass
class Found:
    """A node that uses a model, and what a walk found. loader: id of the node that loads it, ours: whether of Spillway.

    notes: (code, values) to be said.
    """

    id: str
    kind: str
    loader: str = ""
    ours: bool = True
    loaded: Loaded = field(default_factory=lambda: Loaded(""))
    notes: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def note(self, code: str, **values: str) -> None:
        if (code, values) not in self.notes:
            self.notes.append((code, values))


def node_of(prompt: dict[str, Node], link: list[Any]) -> Node:
    try:
        return prompt[str(link[0])]
    except KeyError:
        raise NotForeseen("missing", node=str(link[0]), kind="") from None


def literal(inputs: dict[str, Any], name: str, kind: str) -> Any:
    value = inputs.get(name)
    if value is None or is_link(value):
        raise NotForeseen("wired", widget=name, kind=kind)
    return value


def wired_policy(prompt: dict[str, Node], link: Any, found: Found) -> Policy | None:
    return made_policy(prompt, str(link[0]), found) if is_link(link) else None


def made_policy(prompt: dict[str, Node], name: str, found: Found) -> Policy | None:
    kind = prompt.get(name, {}).get("class_type")
    try:
        if kind not in (POLICY_NODE, RULES_NODE):
            raise ValueError(f"a node of another kind ({kind})")
        return policy_of(prompt, name)[0]
    except (KeyError, TypeError, ValueError):
        found.note("policy", node=name, kind=str(kind))
        return None


def loras_of(prompt: dict[str, Node], node: Node, side: str) -> list[tuple[str, float]]:
    """List (name, strength) of the LoRAs of a node in LORAS, the last one first. side: 'model' or 'clip'.

    Raises NotForeseen where another node gives a name or a strength.
    """
    kind, inputs = node["class_type"], node["inputs"]
    if kind in ONE_LORA:
        name, strength = str(literal(inputs, "lora_name", kind)), float(literal(inputs, f"strength_{side}", kind))
        return [(name, strength)]
    if kind == "SpillwayLoraStack":
        slots = [(inputs.get(f"lora_{n}", NONE), inputs.get(f"strength_{n}", 1.0)) for n in range(1, SLOTS + 1)]
        return [(str(lora), float(strength)) for lora, strength in reversed(slots) if lora != NONE and strength]
    chosen = [node_of(prompt, one)["inputs"] for key, one in inputs.items() if "lora" in key and is_link(one)]
    return [(str(one["lora_name"]), float(one[f"strength_{side}"])) for one in reversed(chosen)]


def lora_paths(loaded: Loaded) -> Loaded:
    """Give what is loaded with paths in the place of LoRAs' names. Raises FileNotFoundError."""
    return replace(loaded, loras=tuple((model_path("loras", name), strength) for name, strength in loaded.loras))
