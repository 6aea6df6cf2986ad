"""Says what a model may take, and where its weights stay while they are not in use."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

Keep = Literal["auto", "always", "free after use"]
Place = Literal["auto", "disk", "ram", "pin"]
LONGEST_PATTERN = 1000
Int8LoRA = Literal["auto", "merge", "side branch"]
Kind = Literal["auto", "aimdo", "software"]


def _check_choice(what: str, fields: Any, name: str, allowed: Any) -> None:
    if getattr(fields, name) not in allowed.__args__:
        choices = ", ".join(allowed.__args__)
        raise ValueError(f"{what}: {name} is {getattr(fields, name)!r}; expected one of {choices}.")


@dataclass(frozen=True)
class Rule:
    """Says how modules with names that match `pattern` (shell wildcards) are kept, in DiffSynth-Studio's four states.

    offload: where the weight lies while not in use. 'disk' is only its file, 'ram' ordinary memory, 'pin' page-locked.
    storage_dtype: of the weight on the device (onload). compute_dtype: of the weight that the op gets (preparing,
    computation). resident: False streams these modules always. Raises ValueError for an unknown offload.
    """

    pattern: str
    offload: Place = "auto"
    storage_dtype: torch.dtype | None = None
    compute_dtype: torch.dtype | None = None
    resident: bool = True

    def __post_init__(self) -> None:
        known = isinstance(self.pattern, str) and len(self.pattern) <= LONGEST_PATTERN
        try:
            fnmatch.fnmatchcase("", self.pattern if known else "")
        except re.error:  # older versions of Python know no empty range
            known = False
        if not known:
            raise ValueError(
                f"rule {repr(self.pattern)[:40]}: expected a pattern of names with at most {LONGEST_PATTERN} "
                "characters, such as *.img_attn.*"
            )
        _check_choice(f"rule '{self.pattern}'", self, "offload", Place)


@dataclass(frozen=True)
class Policy:
    """Says what one model may take. All sizes are in bytes, and None leaves the choice to Spillway.

    vram_share, headroom_share, pinned_share: parts from 0 to 1 of the device's memory, or the RAM, in place of bytes.
    vram_bytes: the most that the weights may hold on the device (on a CPU, in host memory). 0 streams everything.
    headroom_bytes: kept free on the device for the computation.
    pinned_bytes: host memory for pins. prefetch: bundles begun ahead at most. streams: offload streams.
    keep: 'always' never gives way to other models, 'free after use' gives everything back after each run.
    priority: models of higher priority are evicted later. int8_lora: LoRAs on quantised weights are merged
    before those are rounded, or stay beside them in floating point. 'auto' never merges into 4 bits, into a file's 8
    bits as ComfyUI does, and into others while that rounds no worse.
    Raises ValueError for a value that a field does not take.
    """

    vram_bytes: int | None = None
    headroom_bytes: int | None = None
    pinned_bytes: int | None = None
    keep: Keep = "auto"
    priority: int = 0
    prefetch: int | None = None
    streams: int = 2
    vbar: Kind = "auto"
    int8_lora: Int8LoRA = "auto"
    rules: tuple[Rule, ...] = ()
    vram_share: float | None = None
    headroom_share: float | None = None
    pinned_share: float | None = None

    def __post_init__(self) -> None:
        for name in ("vram_share", "headroom_share", "pinned_share"):
            share = getattr(self, name)
            if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
                raise ValueError(f"policy: {name} is {share!r}; expected a part from 0 to 1, or None.")
        for name in ("vram_bytes", "headroom_bytes", "pinned_bytes", "prefetch", "streams"):
            value = getattr(self, name)
            optional = name.endswith("_bytes") or name == "prefetch"
            if not (value is None and optional) and (not isinstance(value, int) or value < 0):
                expected = "a whole number of at least 0" + ", or None" * optional
                raise ValueError(f"policy: {name} is {value!r}; expected {expected}.")
        if not isinstance(self.priority, int):
            raise ValueError(f"policy: priority is {self.priority!r}; expected a whole number.")
        _check_choice("policy", self, "keep", Keep)
        _check_choice("policy", self, "vbar", Kind)
        _check_choice("policy", self, "int8_lora", Int8LoRA)

    def rule_for(self, name: str) -> Rule | None:
        """Find the first rule whose pattern matches a module's name, or None."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(name, rule.pattern)), None)

    def may_reside(self, name: str) -> bool:
        """Say whether a module's weights may stay on the device."""
        rule = self.rule_for(name)
        return rule is None or rule.resident

    def in_bytes(self, device_bytes: int, ram_bytes: int) -> Policy:
        """Give the policy with bytes in the place of shares, for a device and a machine of these sizes."""
        wholes = {"vram": device_bytes, "headroom": device_bytes, "pinned": ram_bytes}
        shares = {name: getattr(self, f"{name}_share") for name in wholes}
        sizes: dict[str, Any] = {
            f"{name}_bytes": int(share * wholes[name]) for name, share in shares.items() if share is not None
        }
        return replace(self, **sizes, vram_share=None, headroom_share=None, pinned_share=None) if sizes else self

    def with_changes(self, **changes: Any) -> Policy:
        """Copy the policy with some fields changed. Raises ValueError for a value that a field does not take."""
        return replace(self, **changes)
