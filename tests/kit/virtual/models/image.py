"""Flux, Qwen-Image and Z-Image: comfy/ldm/flux, comfy/ldm/qwen_image and comfy/ldm/lumina of ComfyUI 0.33."""

from __future__ import annotations

from ..layers import Block, Layer, Linear, Model, Norm


def attention(queries: int, keys: int, width: int) -> float:
    """Return the operations of an attention over all heads."""
    return 4.0 * queries * keys * width


# -- Flux


def _double(image: int, text: int, width: int) -> Block:
    layers: dict[str, Layer] = {}
    for side, tokens in (("img", image), ("txt", text)):
        layers |= {
            f"{side}_mod.lin": Linear(6 * width, width, 1),
            f"{side}_attn.qkv": Linear(3 * width, width, tokens),
            f"{side}_attn.norm.query_norm": Norm(128, tokens * width),
            f"{side}_attn.norm.key_norm": Norm(128, tokens * width),
            f"{side}_attn.proj": Linear(width, width, tokens),
            f"{side}_mlp.0": Linear(4 * width, width, tokens),
            f"{side}_mlp.2": Linear(width, 4 * width, tokens),
        }
    layers["txt_attn.norm.key_norm"].flops += attention(image + text, image + text, width)
    first = ("attn.qkv", "attn.norm.query_norm", "attn.norm.key_norm")
    last = ("attn.proj", "mlp.0", "mlp.2")
    order = ["img_mod.lin", "txt_mod.lin"]
    order += [f"{side}_{name}" for names in (first, last) for side in ("img", "txt") for name in names]
    return Block(layers, order)


def _single(tokens: int, width: int) -> Block:
    key_norm = Norm(128, tokens * width)
    key_norm.flops = attention(tokens, tokens, width)
    layers: dict[str, Layer] = {
        "linear1": Linear(7 * width, width, tokens),
        "linear2": Linear(width, 5 * width, tokens),
        "norm.query_norm": Norm(128, tokens * width),
        "norm.key_norm": key_norm,
        "modulation.lin": Linear(3 * width, width, 1),
    }
    return Block(layers, ("modulation.lin", "linear1", "norm.query_norm", "norm.key_norm", "linear2"))


def flux(image: int, text: int = 512, width: int = 3072) -> Model:
    """Flux dev. image: tokens of the picture."""
    parts: dict = {"img_in": Linear(width, 64, image)}
    for name, into in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        parts |= {f"{name}.in_layer": Linear(width, into, 1), f"{name}.out_layer": Linear(width, width, 1)}
    parts["txt_in"] = Linear(width, 4096, text)
    parts |= {f"double_blocks.{number}": _double(image, text, width) for number in range(19)}
    parts |= {f"single_blocks.{number}": _single(image + text, width) for number in range(38)}
    parts["final_layer.adaLN_modulation.1"] = Linear(2 * width, width, 1)
    parts["final_layer.linear"] = Linear(64, width, image)
    ends = ("final_layer.linear", "final_layer.adaLN_modulation.1")
    registered = [name for name in parts if "guidance" not in name and name not in ends]
    at = registered.index("txt_in")
    registered[at:at] = ["guidance_in.in_layer", "guidance_in.out_layer"]
    return Model("Flux", parts, [*registered, *ends])


# -- Qwen-Image


def _qwen_block(image: int, text: int, width: int) -> Block:
    layers: dict[str, Layer] = {
        "img_mod.1": Linear(6 * width, width, 1),
        "img_mlp.net.0.proj": Linear(4 * width, width, image),
        "img_mlp.net.2": Linear(width, 4 * width, image),
        "txt_mod.1": Linear(6 * width, width, 1),
        "txt_mlp.net.0.proj": Linear(4 * width, width, text),
        "txt_mlp.net.2": Linear(width, 4 * width, text),
    }
    for name, tokens in (("norm_q", image), ("norm_k", image), ("norm_added_q", text), ("norm_added_k", text)):
        layers[f"attn.{name}"] = Norm(128, tokens * width)
    layers["attn.norm_added_k"].flops = attention(image + text, image + text, width)
    for name in ("to_q", "to_k", "to_v"):
        layers[f"attn.{name}"] = Linear(width, width, image)
    for name in ("add_q_proj", "add_k_proj", "add_v_proj"):
        layers[f"attn.{name}"] = Linear(width, width, text)
    layers |= {"attn.to_out.0": Linear(width, width, image), "attn.to_add_out": Linear(width, width, text)}
    inside = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
    inside += [
        f"attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k", "to_out.0", "to_add_out")
    ]
    order = ["img_mod.1", "txt_mod.1", *inside]
    order += ["img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"]
    return Block(layers, order)


def qwen_image(image: int = 6889, text: int = 256, width: int = 3072) -> Model:
    """Qwen-Image, 20 billion parameters, at 1328 x 1328."""
    parts: dict = {
        "img_in": Linear(width, 64, image),
        "txt_norm": Norm(3584, text * 3584),
        "txt_in": Linear(width, 3584, text),
        "time_text_embed.timestep_embedder.linear_1": Linear(width, 256, 1),
        "time_text_embed.timestep_embedder.linear_2": Linear(width, width, 1),
    }
    parts |= {f"transformer_blocks.{number}": _qwen_block(image, text, width) for number in range(60)}
    parts |= {"norm_out.linear": Linear(2 * width, width, 1), "proj_out": Linear(64, width, image)}
    time = [name for name in parts if name.startswith("time_text_embed")]
    rest = [name for name in parts if name not in (*time, "img_in", "txt_norm", "txt_in")]
    return Model("QwenImageTransformer2DModel", parts, [*time, "txt_norm", "img_in", "txt_in", *rest])


# -- Z-Image


def _z_block(tokens: int, width: int, modulated: bool = True) -> Block:
    hidden = 10240
    norm = tokens * width
    k_norm = Norm(128, norm)
    k_norm.flops = attention(tokens, tokens, width)
    layers: dict[str, Layer] = {
        "attention.qkv": Linear(3 * width, width, tokens, False),
        "attention.out": Linear(width, width, tokens, False),
        "attention.q_norm": Norm(128, norm),
        "attention.k_norm": k_norm,
        "feed_forward.w1": Linear(hidden, width, tokens, False),
        "feed_forward.w2": Linear(width, hidden, tokens, False),
        "feed_forward.w3": Linear(hidden, width, tokens, False),
    }
    layers |= {name: Norm(width, norm) for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")}
    attends = [f"attention.{name}" for name in ("qkv", "q_norm", "k_norm", "out")]
    feeds = [f"feed_forward.{name}" for name in ("w1", "w3", "w2")]
    order = ["attention_norm1", *attends, "attention_norm2", "ffn_norm1", *feeds, "ffn_norm2"]
    if modulated:
        layers["adaLN_modulation.0"] = Linear(4 * width, 256, 1)
        order.insert(0, "adaLN_modulation.0")
    return Block(layers, order)


def z_image(image: int = 4096, text: int = 256, width: int = 3840) -> Model:
    """Z-Image, 6 billion parameters, at 1024 x 1024."""
    parts: dict = {
        "t_embedder.mlp.0": Linear(1024, 256, 1),
        "t_embedder.mlp.2": Linear(256, 1024, 1),
        "cap_embedder.0": Norm(2560, text * 2560),
        "cap_embedder.1": Linear(width, 2560, text),
    }
    parts |= {f"context_refiner.{number}": _z_block(text, width, False) for number in range(2)}
    parts["x_embedder"] = Linear(width, 64, image)
    parts |= {f"noise_refiner.{number}": _z_block(image, width) for number in range(2)}
    parts |= {f"layers.{number}": _z_block(image + text, width) for number in range(30)}
    parts["final_layer.adaLN_modulation.1"] = Linear(width, 256, 1)
    parts["final_layer.linear"] = Linear(64, width, image)
    starts = ("x_embedder", "noise_refiner", "context_refiner", "t_embedder", "cap_embedder", "layers", "final_layer")
    registered = [name for start in starts for name in parts if name.startswith(start)]
    return Model("NextDiT", parts, registered)
