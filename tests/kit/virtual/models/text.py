"""Text encoders: comfy/text_encoders/t5.py with umt5_config_xxl.json, and llama.py of ComfyUI 0.33."""

from __future__ import annotations

from ..layers import Block, Layer, Linear, Model, Norm, Table
from .image import attention


def _t5_block(tokens: int, width: int, hidden: int) -> Block:
    inside, feed = "layer.0.SelfAttention.", "layer.1.DenseReluDense."
    layers: dict[str, Layer] = {inside + name: Linear(width, width, tokens, False) for name in "qkvo"}
    layers[inside + "v"].flops += attention(tokens, tokens, width)
    layers |= {inside + "relative_attention_bias": Table(32, 64, 32), "layer.0.layer_norm": Norm(width, tokens * width)}
    layers |= {feed + name: Linear(hidden, width, tokens, False) for name in ("wi_0", "wi_1")}
    layers |= {feed + "wo": Linear(width, hidden, tokens, False), "layer.1.layer_norm": Norm(width, tokens * width)}
    order = ["layer.0.layer_norm", *(inside + name for name in ("q", "k", "v", "relative_attention_bias", "o"))]
    return Block(layers, [*order, "layer.1.layer_norm", *(feed + name for name in ("wi_0", "wi_1", "wo"))])


def umt5_xxl(tokens: int = 512, width: int = 4096) -> Model:
    """The text encoder of Wan. Its table is 2.1 GB, its next largest weight 84 MB."""
    parts: dict = {"shared": Table(256384, width, tokens)}
    parts |= {f"encoder.block.{number}": _t5_block(tokens, width, 10240) for number in range(24)}
    parts["encoder.final_layer_norm"] = Norm(width, tokens * width)
    return Model("T5", parts, [*list(parts)[1:], "shared"])


def _gemma_block(tokens: int, width: int) -> Block:
    layers: dict[str, Layer] = {
        "self_attn.q_proj": Linear(4096, width, tokens, False),
        "self_attn.k_proj": Linear(2048, width, tokens, False),
        "self_attn.v_proj": Linear(2048, width, tokens, False, attention(tokens, tokens, 4096)),
        "self_attn.o_proj": Linear(width, 4096, tokens, False),
        "self_attn.q_norm": Norm(256, tokens * 4096),
        "self_attn.k_norm": Norm(256, tokens * 2048),
        "mlp.gate_proj": Linear(15360, width, tokens, False),
        "mlp.up_proj": Linear(15360, width, tokens, False),
        "mlp.down_proj": Linear(width, 15360, tokens, False),
    }
    before = ("input_layernorm", "pre_feedforward_layernorm")
    after = ("post_attention_layernorm", "post_feedforward_layernorm")
    layers |= {name: Norm(width, tokens * width) for name in (before[0], after[0], before[1], after[1])}
    attends = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")]
    feeds = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    return Block(layers, [before[0], *attends, after[0], before[1], *feeds, after[1]])


def gemma_12b(tokens: int = 1024, width: int = 3840) -> Model:
    """The text encoder of LTX-2, without its part for pictures."""
    parts: dict = {"model.embed_tokens": Table(262208, width, tokens)}
    parts |= {f"model.layers.{number}": _gemma_block(tokens, width) for number in range(48)}
    parts["model.norm"] = Norm(width, tokens * width)
    return Model("Gemma3_12B", parts)
