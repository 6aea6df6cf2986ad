"""The names of a text encoder's tensors in files of llama.cpp, as the model's own code names them.

Source: llama.cpp, gguf-py/gguf/tensor_mapping.py. Diffusion models keep their own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# (pattern of the file's name, the model's). N of a block is the first group.
T5 = (
    (r"token_embd\.weight", "shared.weight"),
    (r"enc\.output_norm\.weight", "encoder.final_layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.attn_rel_b\.weight", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"enc\.blk\.(\d+)\.attn_norm\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.attn_([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (r"enc\.blk\.(\d+)\.ffn_norm\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"enc\.blk\.(\d+)\.ffn_gate\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"enc\.blk\.(\d+)\.ffn_up\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"enc\.blk\.(\d+)\.ffn_down\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)
QWEN = (
    (r"token_embd\.weight", "model.embed_tokens.weight"),
    (r"output_norm\.weight", "model.norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_output\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
)
# By `general.architecture`. Llama's queries and keys lie in another order there, Gemma's norms and tokenizer in another
# form, so these are no matter of names.
BY_ARCHITECTURE = {"t5": T5, "t5encoder": T5, "qwen2": QWEN, "qwen2vl": QWEN, "qwen3": QWEN}


def renaming(architecture: str) -> Callable[[str], str] | None:
    """Return what gives the model's name for a file's name. None for a file whose names are the model's."""
    table = BY_ARCHITECTURE.get(architecture)
    if table is None:
        return None
    patterns = [(re.compile(pattern), name) for pattern, name in table]

    def rename(key: str) -> str:
        for pattern, name in patterns:
            found = pattern.fullmatch(key)
            if found is not None:
                return found.expand(name)
        return key

    return rename
