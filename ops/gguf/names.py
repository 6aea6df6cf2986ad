"""The names of a text encoder's tensors in files of llama.cpp, as the model's own code names them.

Source: llama.cpp, gguf-py/gguf/tensor_mapping.py. Diffusion models keep their own names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

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
_LLAMA = (
    (r"token_embd\.weight", "model.embed_tokens.weight"),
    (r"output_norm\.weight", "model.norm.weight"),
    (r"output\.weight", "lm_head.weight"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_output\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
)
LLAMA = (*_LLAMA, (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"))
GEMMA = (
    *_LLAMA,
    (r"blk\.(\d+)\.post_attention_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.pre_feedforward_layernorm.weight"),
    (r"blk\.(\d+)\.post_ffw_norm\.weight", r"model.layers.\1.post_feedforward_layernorm.weight"),
)
# Of Qwen 2.5-VL. Queries, keys and values become one weight afterwards.
VISION = (
    (r"mm\.(\d)\.(weight|bias)", r"visual.merger.mlp.\1.\2"),
    (r"v\.post_ln\.weight", "visual.merger.ln_q.weight"),
    (r"v\.patch_embd\.weight(\.1)?", r"visual.patch_embed.proj.weight\1"),
    (r"v\.blk\.(\d+)\.ln([12])\.weight", r"visual.blocks.\1.norm\2.weight"),
    (r"v\.blk\.(\d+)\.attn_(q|k|v|qkv)\.(weight|bias)", r"visual.blocks.\1.attn.\2.\3"),
    (r"v\.blk\.(\d+)\.attn_out\.(weight|bias)", r"visual.blocks.\1.attn.proj.\2"),
    (r"v\.blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)", r"visual.blocks.\1.mlp.\2_proj.\3"),
)


def renaming(table: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """Return what gives the model's name for a file's name. A name that is not in the table stays."""
    patterns = [(re.compile(pattern), name) for pattern, name in table]

    def rename(key: str) -> str:
        for pattern, name in patterns:
            found = pattern.fullmatch(key)
            if found is not None:
                return found.expand(name)
        return key

    return rename
