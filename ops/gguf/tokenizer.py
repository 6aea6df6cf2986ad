"""Makes the tokenizer that a text encoder's loader asks for of the token lists in a GGUF file.

Sources: sentencepiece's `sentencepiece_model.proto`, Mistral's `tekken.json`, and what llama.cpp's conversion writes.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

# Types of pieces, which are the same numbers in both formats.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
SPACE = "\u2581".encode()
# Fields of TrainerSpec that name special pieces: what the metadata calls it, the field of its number, of its text.
SPECIAL = (("unknown", 40, 45), ("bos", 41, 46), ("eos", 42, 47), ("padding", 43, 48))


def spiece_model(
    metadata: Mapping[str, Any], tokens: Sequence[bytes], scores: Sequence[float], types: Sequence[int], charsmap: bytes
) -> bytes:
    """Make a sentencepiece model. metadata: the file's, of which the keys `tokenizer.ggml.*` are read.

    charsmap: the normalisation that the file holds, or nothing.
    """
    found = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name, _, _ in SPECIAL}
    ids = {name: number if isinstance(number, int) else -1 for name, number in found.items()}
    parts, seen = [], set()
    for number, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        # llama.cpp calls every token of a chat template a control token. Those in a text would then not be found.
        if kind == CONTROL and number not in ids.values():
            kind = USER_DEFINED
        if kind == USER_DEFINED:  # llama.cpp writes real spaces in these
            token = token.replace(b" ", SPACE)
        if not token or token in seen:  # which sentencepiece refuses
            token, kind = b"[%d]" % number, UNUSED
        seen.add(token)
        piece = b"\x0a%b%b\x15%b\x18%c" % (_varint(len(token)), token, struct.pack("<f", score), kind)
        parts.append(b"\x0a%b%b" % (_varint(len(piece)), piece))
    by_scores = metadata.get("tokenizer.ggml.model") == "t5"
    trainer = _number(3, UNIGRAM if by_scores else BPE) + _number(4, len(tokens)) + _number(35, BYTE in types)
    for name, number_field, text_field in SPECIAL:
        trainer += _number(number_field, ids[name])
        if 0 <= ids[name] < len(tokens):
            trainer += _bytes(text_field, tokens[ids[name]])
    normalizer = _bytes(1, b"nmt_nfkc" if charsmap else b"identity") + _bytes(2, charsmap)
    normalizer += _number(3, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    normalizer += _number(4, bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)))
    return b"".join(parts) + _bytes(2, trainer) + _bytes(3, normalizer)


def _varint(number: int) -> bytes:
    """Write a number in seven bits a byte. A negative one counts as 64 bits."""
    number &= (1 << 64) - 1
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(int(value))


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def tekken_model(tokens: Sequence[bytes], types: Sequence[int]) -> bytes:
    """Make Mistral's `tekken.json`, whose ordinary tokens are counted from behind the special ones."""
    byte_of = _bytes_of_characters()
    special = [number for number, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
    is_special = set(special)
    vocabulary: list[dict[str, Any]] = []
    for number, token in enumerate(tokens):
        if number not in is_special:
            raw = bytes(byte_of[character] for character in token.decode())
            vocabulary.append({"rank": len(vocabulary), "token_bytes": base64.b64encode(raw).decode()})
    return json.dumps(
        {
            "config": {"default_vocab_size": len(tokens), "default_num_special_tokens": len(special)},
            "vocab": vocabulary,
            "special_tokens": [{"rank": number, "token_str": tokens[number].decode()} for number in special],
        }
    ).encode()


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character stands for in a byte-level vocabulary, as GPT-2's."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
