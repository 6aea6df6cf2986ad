"""Finds what holds for a whole graph: in its policy nodes, also where their outputs are cached, and in the settings."""

from __future__ import annotations

import logging
from typing import Any

from comfy_execution.graph_utils import is_link

from ..cache.comfyui.settings import models_cap
from ..patcher.policy import Policy
from .checked_node import values_of
from .inputs import AUTO

log = logging.getLogger("spillway")

POLICY_NODE = "SpillwayPolicy"
RULES_NODE = "SpillwayPlacementRules"


def read(prompt: dict[str, Any]) -> tuple[Policy | None, list[int]]:
    """Return (the policy for the whole graph or None, caps in bytes) of a prompt, with the cap of the settings.

    A wrong value is left to its node.
    """
    policy: Policy | None = None
    of_settings = models_cap()
    caps = [] if of_settings is None else [of_settings]
    for name, node in prompt.items():
        if node.get("class_type") != POLICY_NODE:
            continue
        try:
            made = _for_all(prompt, name)
        except Exception as error:  # ComfyUI checks what an output needs, and nothing else: anything may stand here
            log.warning("[Spillway] node %s says nothing for the whole graph before it runs: %s", name, error)
            continue
        policy = made[0] or policy
        caps += [] if made[1] is None else [made[1]]
    return policy, caps


def _for_all(prompt: dict[str, Any], name: str) -> tuple[Policy | None, int | None]:
    """Return (the policy of a node or None, cap in bytes or None), as far as they are for the whole graph."""
    inputs = prompt[name].get("inputs", {})
    is_for_all = inputs.get("whole_graph") is True
    says_a_cap = inputs.get("all_models_gb", AUTO) != AUTO or inputs.get("profile", "none") != "none"
    if not (is_for_all or says_a_cap):
        return None, None
    made, cap = policy_of(prompt, name)
    return made if is_for_all else None, cap


def policy_of(prompt: dict[str, Any], name: str) -> tuple[Policy, int | None]:
    """Make the policy of a node in a prompt -> (policy, cap). Raises ValueError where another node gives a value."""
    from .policy import SpillwayPolicy
    from .rules import SpillwayPlacementRules

    node = prompt[name]
    given = {key: value for key, value in node["inputs"].items() if key != "model"}
    wire = given.pop("policy", None)
    base = policy_of(prompt, wire[0])[0] if wire is not None else None
    linked = [key for key, value in given.items() if is_link(value)]
    if linked:
        raise ValueError(f"its input '{linked[0]}' comes from another node, and is known when that has run")
    if node["class_type"] == RULES_NODE:
        return SpillwayPlacementRules.made(policy=base, **values_of(SpillwayPlacementRules, given)), None
    if node["class_type"] != POLICY_NODE:
        raise ValueError(f"its policy comes from a node of another kind ({node['class_type']})")
    return SpillwayPolicy.made(policy=base, **values_of(SpillwayPolicy, given))
