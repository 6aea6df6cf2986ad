"""Wan and LTX-2: comfy/ldm/wan and comfy/ldm/lightricks of ComfyUI 0.33."""

from __future__ import annotations

from ..layers import Block, Layer, Linear, Model, Norm
from .image import attention

# -- Wan


def _wan_block(tokens: int, text: int, width: int, hidden: int) -> Block:
    norm = tokens * width
    layers: dict[str, Layer] = {}
    for name, keys in (("self_attn", tokens), ("cross_attn", text)):
        layers |= {
            f"{name}.q": Linear(width, width, tokens),
            f"{name}.k": Linear(width, width, keys),
            f"{name}.v": Linear(width, width, keys, attention=attention(tokens, keys, width)),
            f"{name}.o": Linear(width, width, tokens),
            f"{name}.norm_q": Norm(width, norm),
            f"{name}.norm_k": Norm(width, keys * width),
        }
        if name == "self_attn":
            layers["norm3"] = Norm(width, norm, bias=True)
    layers |= {"ffn.0": Linear(hidden, width, tokens), "ffn.2": Linear(width, hidden, tokens)}
    inside = ("q", "norm_q", "k", "norm_k", "v", "o")
    order = [f"self_attn.{name}" for name in inside] + ["norm3"] + [f"cross_attn.{name}" for name in inside]
    return Block(layers, [*order, "ffn.0", "ffn.2"], table=(6, width))


def wan_14b(latent_frames: int, text: int = 512, width: int = 5120) -> Model:
    """Wan 2.x, 14 billion parameters, at 832 x 480."""
    tokens = latent_frames * 30 * 52
    parts: dict = {
        "patch_embedding": Linear(width, 64, tokens),
        "time_embedding.0": Linear(width, 256, 1),
        "time_embedding.2": Linear(width, width, 1),
        "time_projection.1": Linear(6 * width, width, 1),
        "text_embedding.0": Linear(width, 4096, text),
        "text_embedding.2": Linear(width, width, text),
    }
    parts |= {f"blocks.{number}": _wan_block(tokens, text, width, 13824) for number in range(40)}
    parts["head.head"] = Linear(64, width, tokens)
    starts = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")
    registered = [name for start in starts for name in parts if name.startswith(start)]
    return Model("WanModel", parts, registered)


# -- LTX-2


def _cross(name: str, into: tuple[int, int], tokens: tuple[int, int], inner: int) -> dict[str, Layer]:
    """An attention of LTX. into: width of queries and of keys. tokens: of both. inner: width of all heads."""
    queries, keys = tokens
    return {
        f"{name}.q_norm": Norm(inner, queries * inner),
        f"{name}.k_norm": Norm(inner, keys * inner),
        f"{name}.to_q": Linear(inner, into[0], queries),
        f"{name}.to_k": Linear(inner, into[1], keys),
        f"{name}.to_v": Linear(inner, into[1], keys, attention=attention(queries, keys, inner)),
        f"{name}.to_out.0": Linear(into[0], inner, queries),
    }


def _ltx_block(video: int, audio: int, text: int) -> Block:
    v, a = 4096, 2048
    layers = _cross("attn1", (v, v), (video, video), v)
    layers |= _cross("audio_attn1", (a, a), (audio, audio), a)
    layers |= _cross("attn2", (v, v), (video, text), v)
    layers |= _cross("audio_attn2", (a, a), (audio, text), a)
    layers |= _cross("audio_to_video_attn", (v, a), (video, audio), a)
    layers |= _cross("video_to_audio_attn", (a, v), (audio, video), a)
    for name, width, tokens in (("ff", v, video), ("audio_ff", a, audio)):
        layers[f"{name}.net.0.proj"] = Linear(4 * width, width, tokens)
        layers[f"{name}.net.2"] = Linear(width, 4 * width, tokens)
    inside = ("to_q", "to_k", "to_v", "q_norm", "k_norm", "to_out.0")
    attentions = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    order = [f"{attention}.{name}" for attention in attentions for name in inside]
    order += [f"{name}.net.{end}" for name in ("ff", "audio_ff") for end in ("0.proj", "2")]
    return Block(layers, order, table=(6, v))


def ltx_2(video: int = 6144, audio: int = 126, text: int = 1024) -> Model:
    """LTX-2, 19 billion parameters, 768 x 512 and five seconds with sound.

    Left out: the connectors, which run once for each prompt, and the tables of the audio side.
    """
    v, a = 4096, 2048
    parts: dict = {"patchify_proj": Linear(v, 128, video), "audio_patchify_proj": Linear(a, 128, audio)}
    adaln = {"adaln_single": (v, 6), "audio_adaln_single": (a, 6), "av_ca_video_scale_shift_adaln_single": (v, 4)}
    adaln |= {"av_ca_a2v_gate_adaln_single": (v, 1), "av_ca_audio_scale_shift_adaln_single": (a, 4)}
    adaln["av_ca_v2a_gate_adaln_single"] = (a, 1)
    for name, (width, count) in adaln.items():
        parts[f"{name}.emb.timestep_embedder.linear_1"] = Linear(width, 256, 1)
        parts[f"{name}.emb.timestep_embedder.linear_2"] = Linear(width, width, 1)
        parts[f"{name}.linear"] = Linear(count * width, width, 1)
    for name, width in (("caption_projection", v), ("audio_caption_projection", a)):
        parts[f"{name}.linear_1"] = Linear(width, 3840, text)
        parts[f"{name}.linear_2"] = Linear(width, width, text)
    parts |= {f"transformer_blocks.{number}": _ltx_block(video, audio, text) for number in range(48)}
    parts |= {"proj_out": Linear(128, v, video), "audio_proj_out": Linear(128, a, audio)}
    return Model("LTXAVModel", parts)
