"""What llama.cpp's files of text encoders have otherwise than the models' own code, by their architecture.

Source: llama.cpp, `conversion/`. The files of diffusion models have the models' own names and numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .names import GEMMA, LLAMA, T5, VISION

SPIECE, TEKKEN = "spiece_model", "tekken_model"
UMT5_TOKENS = 256384


@dataclass(frozen=True)
class TextEncoder:
    """names: see names.py. paired: rows of queries and keys lie in pairs, one of each half of their head.

    grown: the weights of norms are greater by one. tokenizer: the key under which loaders look for one, if they have
    none of their own.
    """

    names: tuple[tuple[str, str], ...]
    paired: bool = False
    grown: bool = False
    tokenizer: Callable[[int, str], str] = lambda rows, kind: ""


def _t5(rows: int, kind: str) -> str:
    """UMT5's table has more rows than that of T5, whose tokenizer loaders bring along."""
    return SPIECE if rows == UMT5_TOKENS else ""


def _llama(rows: int, kind: str) -> str:
    return TEKKEN if kind == "tekken" else ""


_QWEN = TextEncoder(LLAMA)
_GEMMA = TextEncoder(GEMMA, grown=True, tokenizer=lambda rows, kind: SPIECE)
_PAIRED = TextEncoder(LLAMA, paired=True, tokenizer=_llama)
# By `general.architecture`.
TEXT_ENCODERS = {
    "t5": TextEncoder(T5, tokenizer=_t5),
    "t5encoder": TextEncoder(T5, tokenizer=_t5),
    "llama": _PAIRED,
    "mistral3": _PAIRED,
    "qwen2": _QWEN,
    "qwen2vl": _QWEN,
    "qwen3": _QWEN,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
}
# `general.architecture` of a vision tower, which a loader finds beside its encoder (vision.py).
TOWER, WITH_TOWER = "clip", "qwen2vl"
VISION_TOWER = TextEncoder(VISION)
# Programs that keep the models' own names write these, or none.
OWN_NAMES = ("", "pig", "cow")
