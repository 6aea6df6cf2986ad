"""Tells what a safetensors file holds, from its header alone. Needs no torch.

An architecture is told by names that no other has. A name may stand behind any prefix.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .safetensors_header import Entry, Header, SourceError, read_header

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# (architecture, names that must all be there). The first that fits counts.
DIFFUSION_MODELS: list[tuple[str, tuple[str, ...]]] = [
    ("Stable Diffusion 3", ("joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight")),
    ("Chroma", ("distilled_guidance_layer.norms.0.scale", "double_blocks.0.img_attn.qkv.weight")),
    ("HunyuanVideo", ("txt_in.individual_token_refiner.blocks.0.norm1.weight",)),
    ("Flux.2", ("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight")),
    ("Flux", ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")),
    ("Flux", ("transformer_blocks.0.attn.add_q_proj.weight", "single_transformer_blocks.0.proj_mlp.weight")),
    ("Wan", ("blocks.0.cross_attn.k.weight", "head.modulation", "patch_embedding.weight")),
    ("Z-Image", ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight", "x_pad_token")),
    ("Lumina 2", ("cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight")),
    ("Qwen-Image", ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")),
    ("LTX-Video", ("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight")),
    ("PixArt", ("adaln_single.emb.timestep_embedder.linear_1.bias", "pos_embed.proj.bias")),
    ("HiDream", ("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight")),
    ("Mochi", ("t5_yproj.weight", "blocks.0.attn.qkv_x.weight")),
    ("Cosmos", ("blocks.block0.blocks.0.block.attn.to_q.0.weight",)),
    ("AuraFlow", ("double_layers.0.attn.w1q.weight",)),
    ("Hunyuan-DiT", ("mlp_t5.0.weight", "blocks.0.attn1.Wqkv.weight")),
    ("Stable Cascade", ("clf.1.weight", "clip_txt_mapper.weight")),
    ("Stable Audio", ("transformer.layers.0.cross_attend_norm.gamma", "transformer.rotary_pos_emb.inv_freq")),
]  # fmt: skip
# By the width of the text that the first attention takes, for U-Nets.
U_NET = re.compile(r"(?:^|\.)(?:input|down)_blocks\.\d+\..*attn2\.to_k\.weight$")
U_NETS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL", 1280: "SDXL refiner"}
PARTS: list[tuple[str, tuple[str, ...]]] = [
    ("VAE", ("decoder.conv_in.weight",)),
    ("VAE", ("decoder.conv1.weight", "encoder.conv1.weight")),
    ("VAE", ("decoder.upsamples.0.residual.0.gamma",)),
    ("CLIP vision", ("vision_model.embeddings.class_embedding",)),
    ("CLIP vision", ("vision_model.embeddings.patch_embedding.weight",)),
    ("text encoder, CLIP", ("text_model.embeddings.token_embedding.weight",)),
    ("text encoder, CLIP", ("positional_embedding", "token_embedding.weight")),
    ("text encoder, T5", ("encoder.block.0.layer.0.SelfAttention.k.weight",)),
    ("text encoder, a language model", ("layers.0.self_attn.k_proj.weight",)),
]
LORA = re.compile(
    r"\.(lora_up|lora_down|lora_A|lora_B|hada_w1_a|hada_w1_b|hada_w2_a|hada_w2_b|lokr_w[12](_[ab])?|oft_blocks|oft_diag|"
    r"lora\.up|lora\.down|[ab][12])(\.default)?(\.weight)?$|_lora\.(up|down)\.weight$"
)
RANK_FIRST = re.compile(r"(lora_down|lora_A|lora\.down)(\.default)?(\.weight)?$")
CONTROLNET = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight", "controlnet_blocks.0.weight",
              "zero_convs.0.0.weight")  # fmt: skip
# What is put on a model. (kind, architecture, names that must all be there.) The first that fits counts.
ADDED: list[tuple[str, str, tuple[str, ...]]] = [
    ("IP-Adapter", "", ("image_proj.proj.weight",)),
    ("IP-Adapter", "", ("image_proj.latents",)),
    ("IP-Adapter", "", ("ip_adapter.1.to_k_ip.weight",)),
    ("T2I-Adapter", "", ("body.0.in_conv.weight",)),
    ("T2I-Adapter", "", ("body.0.block1.weight", "body.0.block2.weight", "conv_in.weight")),
    ("T2I-Adapter", "", ("adapter.body.0.resnets.0.block1.weight",)),
    ("model patch", "Qwen-Image control", ("controlnet_blocks.0.y_rms.weight",)),
    ("model patch", "USO style reference", ("feature_embedder.mid_layer_norm.bias",)),
    ("model patch", "Z-Image control", ("control_all_x_embedder.2-1.weight",)),
    ("model patch", "Uni3C for Wan", ("controlnet_patch_embedding.weight",)),
    ("model patch", "MultiTalk", ("audio_proj.proj1.weight",)),
    ("model patch", "LLLite", ("lllite_conditioning1.conv1.weight",)),
    ("style model", "Flux Redux", ("redux_down.weight",)),
    ("style model", "", ("style_embedding",)),
    ("embedding", "", ("emb_params",)),
    ("embedding", "", ("string_to_param",)),
    ("upscale model", "", ("RDB1.conv1.weight",)),
    ("upscale model", "", ("conv_first.weight", "conv_last.weight")),
    ("upscale model", "", ("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight")),
]
BESIDE_WEIGHTS = re.compile(
    r"\.(comfy_quant|weight_scale(_2)?|input_scale|scale_weight|scale_input|pre_quant_scale)$|(^|\.)scaled_fp8$"
)


@dataclass
class Probe:
    """Facts about a file. parameters: elements of weights, packed ones unpacked. dtypes: name -> (tensors, bytes)."""

    path: str
    kind: str
    architecture: str
    parameters: int
    file_bytes: int
    tensors: int
    dtypes: dict[str, tuple[int, int]] = field(default_factory=dict)
    quantisation: dict[str, int] = field(default_factory=dict)  # format -> layers
    parts: list[str] = field(default_factory=list)  # of a checkpoint
    ranks: dict[int, int] = field(default_factory=dict)  # of a LoRA: rank -> layers
    metadata: dict[str, str] = field(default_factory=dict)
    files: int = 1
    part: str = ""  # of a file that is a part of a model: which one, and what to choose instead

    @property
    def words(self) -> str:
        """Return the facts for a person, one a line."""
        many = f" in {self.files} files" if self.files > 1 else ""
        lines = [
            f"{os.path.basename(self.path)}: {self.kind}" + (f", {self.architecture}" if self.architecture else ""),
            f"{self.file_bytes:,} bytes{many}, {self.tensors:,} tensors, {self.parameters:,} parameters",
            "dtypes: " + ", ".join(f"{name} ({n} tensors, {size:,} bytes)" for name, (n, size) in self.dtypes.items()),
        ]
        if self.part:
            lines.append(self.part)
        if self.quantisation:
            lines.append("quantised: " + ", ".join(f"{name} ({n} layers)" for name, n in self.quantisation.items()))
        if self.parts:
            lines.append("parts: " + ", ".join(self.parts))
        if self.ranks:
            lines.append("ranks: " + ", ".join(f"{rank} ({n} layers)" for rank, n in self.ranks.items()))
        if self.metadata:
            lines += [f"{key}: {value}" for key, value in self.metadata.items()]
        return "\n".join(lines)


def probe(path: str | os.PathLike[str]) -> Probe:
    """Tell what a file holds. Raises SourceError, with the reason, for a file that is no whole safetensors file."""
    header = read_header(path)
    entries, sizes = checked_entries(header)
    quantised = quantisation(header, entries)
    return describe(str(path), header.file_bytes, entries, sizes, quantised, header.metadata)


def checked_entries(header: Header) -> tuple[dict[str, Entry], Counter[str]]:
    """Return the entries of a file, and the bytes of each dtype. Raises SourceError where one is not in the file."""
    entries = {key: header.entry(key) for key in header.entries}
    sizes: Counter[str] = Counter()
    for key, entry in entries.items():
        nbytes = entry.end - entry.start
        if entry.dtype in BITS:
            nbytes = -(-entry.numel * BITS[entry.dtype] // 8)
        header.check_place(key, entry, nbytes)
        sizes[entry.dtype] += nbytes
    return entries, sizes


def describe(
    path: str,
    file_bytes: int,
    entries: dict[str, Entry],
    sizes: Mapping[str, int],
    quantised: Mapping[str, str],
    metadata: Mapping[str, Any],
) -> Probe:
    """Tell what a header says. sizes: dtype -> bytes. quantised: layer -> format."""
    kind, architecture, parts = _what(_Names(entries), entries)
    dtypes = Counter(entry.dtype for entry in entries.values())
    return Probe(
        path=path,
        kind=kind,
        architecture=architecture,
        parameters=sum(_parameters(key, entry, entries) for key, entry in entries.items()),
        file_bytes=file_bytes,
        tensors=len(entries),
        dtypes={name: (count, sizes[name]) for name, count in dtypes.most_common()},
        quantisation=dict(Counter(quantised.values()).most_common()),
        parts=parts,
        ranks=_ranks(entries) if kind == "LoRA" else {},
        metadata=_said(metadata),
    )


class _Names:
    """The keys, to be found by their ends."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.ends: set[str] = set()
        for key in entries:
            steps = key.split(".")
            self.ends.update(".".join(steps[place:]) for place in range(min(len(steps), 6)))

    def have(self, names: tuple[str, ...]) -> bool:
        return all(name in self.ends for name in names)


def _what(names: _Names, entries: dict[str, Entry]) -> tuple[str, str, list[str]]:
    """Return (kind, architecture, parts of a checkpoint)."""
    if not entries:
        return "an empty file", "", []
    adapters = sum(bool(LORA.search(key)) for key in entries)
    if adapters and 4 * adapters >= len(entries):
        return "LoRA", "", []
    for kind, architecture, wanted in ADDED:
        if names.have(wanted):
            return kind, architecture, []
    if any(name in names.ends for name in CONTROLNET):
        return "ControlNet", "", []
    model = next((name for name, wanted in DIFFUSION_MODELS if names.have(wanted)), "") or _u_net(entries)
    parts = list(dict.fromkeys(name for name, wanted in PARTS if names.have(wanted)))
    if model and parts:
        return "checkpoint", model, [f"diffusion model, {model}", *parts]
    if model:
        return "diffusion model", model, []
    if parts:
        kind, _, architecture = parts[0].partition(", ")
        return kind, architecture, parts if len(parts) > 1 else []
    return "of a kind unknown to Spillway", "", []


def _u_net(entries: dict[str, Entry]) -> str:
    for key, entry in entries.items():
        if U_NET.search(key) and len(entry.shape) == 2:
            return U_NETS.get(entry.shape[1], "a U-Net")
    return ""


def quantisation(header: Header, entries: dict[str, Entry]) -> dict[str, str]:
    """Return layer -> format, by the tensors beside its weight and by the metadata."""
    formats: dict[str, str] = {}
    for key in entries:
        layer, _, name = key.rpartition(".")
        if name not in ("comfy_quant", "weight_scale", "scale_weight", "weight_scale_2"):
            continue
        weight = entries.get(f"{layer}.weight")
        dtype = weight.dtype if weight is not None else ""
        if f"{layer}.weight_scale_2" in entries:
            formats[layer] = "nvfp4"
        elif dtype == "F8_E4M3" and entries.get(f"{layer}.weight_scale", weight).dtype in ("F8_E8M0", "U8"):  # type: ignore[union-attr]
            formats[layer] = "mxfp8"
        else:
            named = {"F8_E4M3": "fp8_e4m3fn scaled", "F8_E5M2": "fp8_e5m2 scaled", "I8": "int8"}
            formats[layer] = named.get(dtype, dtype or "unknown")
    try:
        layers = json.loads(header.metadata.get("_quantization_metadata", "{}")).get("layers", {})
        formats.update({layer: str(conf.get("format")) for layer, conf in layers.items()})
    except (ValueError, AttributeError, TypeError):
        raise SourceError(
            f"{header.path}: its _quantization_metadata are not JSON with 'layers'. Get the file again from its maker."
        ) from None
    return formats


def _parameters(key: str, entry: Entry, entries: dict[str, Entry]) -> int:
    if BESIDE_WEIGHTS.search(key):
        return 0
    # A byte holds two 4-bit numbers.
    packed = entry.dtype == "U8" and f"{key}_scale_2" in entries
    return entry.numel * (2 if packed else 1)


def _ranks(entries: dict[str, Entry]) -> dict[int, int]:
    layers = Counter(entry.shape[0] for key, entry in entries.items() if RANK_FIRST.search(key) and entry.shape)
    return dict(layers.most_common())


def _said(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata, shortened, since workflows and training logs fill pages."""
    shortened = {}
    for key, value in metadata.items():
        text = str(value)
        shortened[key] = text if len(text) <= 120 else f"{text[:100]}… ({len(text):,} characters)"
    return shortened
