"""Does to one model what a button of the panel says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_management

from ..patcher import dynamic_model as dynamic
from ..patcher.comfyui.model_state import state_of
from .between_prompts import held_off

FREE_VRAM, DROP_RAM, KEEP, LIMIT = "free_vram", "drop_ram", "keep", "limit"
ACTIONS = (FREE_VRAM, DROP_RAM, KEEP, LIMIT)
NEXT_USE = "it takes effect when the model is next used"
USAGE = (
    f'a JSON object: "model", the id of a model in /spillway/memory, "action", one of {", ".join(ACTIONS)}, and '
    '"value": true or false for "keep", a whole number of bytes or null for "limit"'
)


@dataclass(frozen=True)
class Action:
    """What is asked for. value: for KEEP whether to, for LIMIT bytes, or None for what a node says."""

    model: int
    name: str
    value: Any = None

    @classmethod
    def read(cls, asked: dict[str, Any]) -> Action:
        """Read a request. Raises ValueError, which says what is wrong with it."""
        unknown = sorted(set(asked) - {"model", "action", "value"})
        if unknown:
            raise ValueError(f"there is no {', '.join(unknown)[:100]} to give.")
        model, name, value = asked.get("model"), asked.get("action"), asked.get("value")
        if isinstance(model, bool) or not isinstance(model, int):
            raise ValueError('"model" is no whole number.')
        if name not in ACTIONS:
            raise ValueError(f'"action" is none of {", ".join(ACTIONS)}.')
        if name == KEEP and not isinstance(value, bool):
            raise ValueError('"value" is neither true nor false.')
        is_size = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
        if name == LIMIT and value is not None and not is_size:
            raise ValueError('"value" is neither a whole number of bytes nor null.')
        return cls(model, name, value)


def act(queue: Any, action: Action) -> dict[str, Any] | None:
    """Do it. None where no such model is alive.

    Returns the bytes freed on the device and in pins, and in words what was put off, as a prompt runs.
    """
    model = next((model for model in list(dynamic.models) if model.ledger.number == action.model), None)
    if model is None:
        return None
    before, pins, put_off = model.device_bytes, model.pinned_bytes, []
    with held_off(queue) as running:
        if not running:
            _do(model, action)
    if running and action.name == DROP_RAM:
        put_off.append("ask again when the prompt has ended")
    elif running and action.name == FREE_VRAM:
        model.free()  # bundles that are lent stay, and what the running node needs comes again
    elif running:
        _choose(model, action, at_once=False)
        put_off.append(NEXT_USE)
    else:
        comfy.model_management.soft_empty_cache()
    freed = {"device": max(0, before - model.device_bytes), "pins": max(0, pins - model.pinned_bytes)}
    return {"freed": freed, "put_off": put_off}


def _do(model: dynamic.DynamicModel, action: Action) -> None:
    if action.name == FREE_VRAM:
        model.free()
    elif action.name == DROP_RAM:
        model.release()
    else:
        _choose(model, action, at_once=True)


def _choose(model: dynamic.DynamicModel, action: Action, at_once: bool) -> None:
    state = state_of(model.module)
    if state is None:
        return
    if action.name == KEEP:
        state.choose(at_once, keep="always" if action.value else "auto")
    else:
        state.choose(at_once, vram_bytes=action.value)
