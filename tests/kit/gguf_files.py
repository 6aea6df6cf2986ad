"""GGUF files of random weights, and the weights that they stand for."""

import math
import struct

import torch

from spillway.ops.gguf.dequantise import IN_TORCH
from spillway.ops.gguf.types import IDS, TYPES

# Where a block of a type keeps its fp16 scale, and where the offset that goes with it, as a multiple of the scale.
SCALES = {
    "Q4_0": (0, None),
    "Q4_1": (0, (2, -7.5)),
    "Q5_0": (0, None),
    "Q5_1": (0, (2, -15.5)),
    "Q8_0": (0, None),
    "Q2_K": (80, (82, 1.5)),
    "Q3_K": (108, None),
    "Q4_K": (0, (2, 7.5)),
    "Q5_K": (0, (2, 15.5)),
    "Q6_K": (208, None),
    "IQ4_NL": (0, None),
    "IQ4_XS": (0, None),
}
# What llama.cpp calls the layers of a decoder, in the order in which its names replace the model's.
LAYERS = (
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
)
# T5's names in the model and in llama.cpp's files, in the same way.
T5 = (
    ("encoder.block.", "enc.blk."),
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("layer.0.SelfAttention.", "attn_"),
    ("layer.0.layer_norm", "attn_norm"),
    ("layer.1.layer_norm", "ffn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"),
    ("shared.weight", "token_embd.weight"),
    ("encoder.final_layer_norm", "enc.output_norm"),
)
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


def renamed(tensors, names):
    """Return tensors under the names that replace parts of their own, one after the other."""
    out = {}
    for key, value in tensors.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        out[key] = value
    return out


def random_blocks(kind, numel, seed=0, std=0.02):
    """Return blocks of a type whose numbers have about that deviation."""
    found = TYPES[IDS[kind]]
    count = numel // found.numbers
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, found.nbytes), dtype=torch.uint8, generator=generator)

    def scale_by(scale):
        at, offset = SCALES[kind]
        _put(blocks, at, scale)
        if offset is not None:
            _put(blocks, offset[0], offset[1] * scale)

    scale_by(torch.ones(count))
    spread = IN_TORCH[kind](blocks[:64], torch.float32).std()
    scale_by((0.5 + torch.rand(count, generator=generator)) * std / spread)
    return blocks


def _put(blocks, at, values):
    blocks[:, at : at + 2] = values.to(torch.float16).view(torch.uint8).view(-1, 2)


def write_gguf(path, tensors, metadata=None, alignment=32):
    """Write {name: tensor, or (type, shape, blocks)}. metadata: texts, numbers, bytes, lists of them."""
    metadata = {"general.architecture": "flux", "general.alignment": alignment, **(metadata or {})}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    parts, offset = [], 0
    for name, tensor in tensors.items():
        if torch.is_tensor(tensor):
            kind, shape, raw = PLAIN[tensor.dtype], tensor.shape, tensor
        else:
            kind, shape, raw = tensor
        head += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", IDS[kind], offset)
        nbytes = raw.numel() * raw.element_size()
        parts.append((raw, -nbytes % alignment))
        offset += nbytes + parts[-1][1]
    with open(path, "wb") as file:
        file.write(head + bytes(-len(head) % alignment))
        for raw, padding in parts:  # one at a time, however large the file
            file.write(memoryview(raw.contiguous().view(-1).view(torch.uint8).numpy()))
            file.write(bytes(padding))
    return str(path)


def _text(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


# How a value of a Python type is written, and that of a list by its first one: (number of the type, struct's code).
CODES = {bool: (7, "?"), int: (5, "i"), float: (6, "f")}


def _value(value):
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, bytes):
        return struct.pack("<IIQ", 9, 0, len(value)) + value
    if not isinstance(value, list):
        number, code = (4, "I") if type(value) is int and value >= 0 else CODES[type(value)]
        return struct.pack(f"<I{code}", number, value)
    if value and isinstance(value[0], (str, bytes)):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    number, code = CODES[type(value[0]) if value else int]
    return struct.pack(f"<IIQ{len(value)}{code}", 9, number, len(value), *value)


def quantised_copy(tensors, kind, seed=0, smallest=2, dtype=torch.bfloat16):
    """Return (what `write_gguf` takes, the tensors that it stands for in `dtype`) of the tensors of a model.

    Matrices whose rows blocks divide get random blocks: of `kind`, or Q8_0 where only its blocks divide them.
    """
    written, stands_for = {}, {}
    for number, (name, tensor) in enumerate(tensors.items()):
        columns = tensor.shape[-1] if tensor.dim() else 1
        chosen = next((each for each in (kind, "Q8_0") if columns % TYPES[IDS[each]].numbers == 0), None)
        if tensor.dim() != smallest or chosen is None:
            written[name] = tensor.float() if tensor.dim() < 2 else tensor
            stands_for[name] = tensor
            continue
        std = float(tensor.float().std()) if tensor.numel() > 1 else 0.02
        blocks = random_blocks(chosen, math.prod(tensor.shape), seed + number, std)
        written[name] = (chosen, tuple(tensor.shape), blocks)
        stands_for[name] = IN_TORCH[chosen](blocks, torch.float32).view(tensor.shape).to(dtype)
    return written, stands_for
