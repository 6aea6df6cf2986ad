"""Text encoders, and the options that ComfyUI's loaders need for smaller ones."""

import math

import torch

from .writing import OPS, entries_of, write

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "eos_token_id": 49407,
}
T5_BASE = {
    "d_ff": 3072,
    "d_kv": 64,
    "d_model": 768,
    "dense_act_fn": "relu",
    "is_gated_act": False,
    "model_type": "t5",
    "num_heads": 12,
    "num_layers": 12,
    "vocab_size": 32128,
}
T5XXL_SMALL = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 64,
    "dense_act_fn": "gelu_pytorch_tanh",
    "is_gated_act": True,
    "model_type": "t5",
    "num_heads": 2,
    "num_layers": 24,
    "vocab_size": 32128,
}
# model_options with which ComfyUI's loaders build the smaller sizes
T5XXL_SMALL_OPTIONS = {"t5xxl_model_config": {name: T5XXL_SMALL[name] for name in ("d_model", "num_heads")}}


def small_options(clip_layers=None, t5_layers=None, qwen_layers=None):
    """model_options (te_model_options for checkpoints) for files with fewer layers than the published ones.

    Make them anew for each load: ComfyUI writes into them."""
    out = {}
    if clip_layers is not None:
        out["clip_l_model_config"] = {"num_hidden_layers": clip_layers}
        out["model_config"] = {"num_hidden_layers": clip_layers}  # for text encoder files, which may be a Long-CLIP
    if t5_layers is not None:
        out["t5base_model_config"] = {"num_layers": t5_layers}
    if qwen_layers is not None:
        out["qwen3_06b_model_config"] = {"num_hidden_layers": qwen_layers}
    return out


def clip_l_entries(dtype, layers):
    from comfy.clip_model import CLIPTextModel

    return entries_of(CLIPTextModel({**CLIP_L, "num_hidden_layers": layers}, torch.float32, "meta", OPS), dtype)


def clip_l(path, dtype=torch.float16, layers=12, seed=0, drop=(), metadata=None):
    """CLIP-L, real size (246 MB in fp16).  With fewer layers it needs small_options(clip_layers=...)."""
    return write(path, clip_l_entries(dtype, layers), seed, metadata, drop)


# ComfyUI knows a CLIP-G by its 31st layer.
CLIP_G_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 31}


def clip_g_small(path, dtype=torch.float16, seed=0):
    """A narrow CLIP-G. Load it with model_options={"clip_g_model_config": CLIP_G_SMALL}."""
    from comfy.clip_model import CLIPTextModel

    config = {**CLIP_L, **CLIP_G_SMALL, "hidden_act": "gelu"}
    return write(path, entries_of(CLIPTextModel(config, torch.float32, "meta", OPS), dtype), seed)


def _t5(config, dtype):
    from comfy.text_encoders.t5 import T5

    entries = entries_of(T5(config, torch.float32, "meta", OPS), dtype)
    # T5 does not scale its attention scores, its queries' weights do
    for name in [name for name in entries if name.endswith("SelfAttention.q.weight")]:
        shape, kind, mean, std = entries[name]
        entries[name] = (shape, kind, mean, std / math.sqrt(config["d_kv"]))
    return entries


def t5_base(path, dtype=torch.bfloat16, layers=12, seed=0, drop=(), metadata=None):
    """T5 base, real size (219 MB), which ComfyUI takes for Stable Audio's text encoder (CLIPType.STABLE_AUDIO)."""
    return write(path, _t5({**T5_BASE, "num_layers": layers}, dtype), seed, metadata, drop)


def t5xxl_small(path, dtype=torch.bfloat16, seed=0, drop=(), metadata=None):
    """A T5-XXL narrowed to 64 (100 MB): its 24 blocks and its d_ff are what ComfyUI knows it by.  Load it with
    model_options=T5XXL_SMALL_OPTIONS."""
    return write(path, _t5(T5XXL_SMALL, dtype), seed, metadata, drop)


def qwen3_06b(path, dtype=torch.bfloat16, layers=2, seed=0, drop=(), metadata=None):
    """A Qwen3 0.6B, as Anima's text encoder (374 MB with 2 layers, most of it embedding).  Load it with
    model_options=small_options(qwen_layers=2)."""
    from comfy.text_encoders.llama import Qwen3_06B

    module = Qwen3_06B({"num_hidden_layers": layers}, torch.float32, "meta", OPS)
    return write(path, entries_of(module, dtype), seed, metadata, drop)


# Names of ComfyUI's language models, by its name for their options, and sizes with which they take a few megabytes.
# Llama's third layer from the end is read.
HEADS = ("num_attention_heads", "num_key_value_heads")
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL_LLAMAS = {
    "llama": ("Llama2", {**NARROW, "num_hidden_layers": 4, "vocab_size": 128320}),
    "gemma2_2b": ("Gemma2_2B", {**NARROW, "num_hidden_layers": 3, "vocab_size": 1100}),
    "qwen25_7b": (
        "Qwen25_7BVLI",
        {**NARROW, "num_hidden_layers": 2, "num_key_value_heads": 4, "num_attention_heads": 4},
    ),
    "gemma3_4b": ("Gemma3_4B", {**NARROW, "num_hidden_layers": 3}),
    "qwen3_4b": ("Qwen3_4B", {**NARROW, "num_hidden_layers": 3}),
}
UMT5_SMALL = {"d_ff": 128, "d_kv": 64, "d_model": 64, "num_heads": 2, "num_layers": 2}


def small_llama_options(name):
    return {f"{name}_model_config": dict(SMALL_LLAMAS[name][1])}


def small_llama(path, name, dtype=torch.bfloat16, seed=0):
    """One of SMALL_LLAMAS.  Load it with model_options=small_llama_options(name)."""
    from comfy.text_encoders import llama

    kind, sizes = SMALL_LLAMAS[name]
    module = getattr(llama, kind)(dict(sizes), torch.float32, "meta", OPS)
    return write(path, entries_of(module, dtype), seed)


def umt5_small(path, dtype=torch.bfloat16, seed=0):
    """A UMT5, which ComfyUI takes for ACE's.  Load it with model_options={"_model_config": UMT5_SMALL}."""
    return write(path, _t5({**T5XXL_SMALL, **UMT5_SMALL, "model_type": "umt5", "vocab_size": 256384}, dtype), seed)
