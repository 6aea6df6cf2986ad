"""Finds what holds for a whole graph: in its policy nodes, also where their outputs are cached, and in the settings."""

from __future__ import annotations

import logging
from typing import Any

from comfy_execution.graph_utils import is_link

from ..cache.comfyui.settings import models_cap
from ..patcher.policy import Policy
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
        inputs = node.get("inputs", {})
        says_a_cap = inputs.get("all_models_gb", AUTO) != AUTO or inputs.get("profile", "none") != "none"
        if inputs.get("whole_graph") is not True and not says_a_cap:
            continue
        try:
            made, cap = policy_of(prompt, name)
        except (KeyError, TypeError, ValueError) as error:
            log.warning("[Spillway] node %s says nothing for the whole graph before it runs: %s", name, error)
            continue
        policy = made if inputs.get("whole_graph") is True else policy
        caps += [] if cap is None else [cap]
    return policy, caps


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
        return SpillwayPlacementRules.made(policy=base, **given), None
    if node["class_type"] != POLICY_NODE:
        raise ValueError(f"its policy comes from a node of another kind ({node['class_type']})")
    return SpillwayPolicy.made(policy=base, **given)
