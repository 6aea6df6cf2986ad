"""Qwen 2.5-VL as llama.cpp writes it: the encoder in one file, its vision tower in another beside it."""

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.text_encoders import qwen_vl

from kit.comfyui import checkpoints
from kit.comfyui.pairs import assert_same, budget
from kit.gguf_files import LAYERS, quantised_copy, renamed, write_gguf
from spillway.ops.files.safetensors_header import SourceError
from spillway.patcher.comfyui.loading import load as comfy_load

# The model's names and llama.cpp's, in the order in which they are replaced.
ENCODER = (("post_attention_layernorm", "ffn_norm"), *LAYERS)
TOWER = (
    ("visual.merger.mlp.", "mm."),
    ("visual.merger.ln_q", "v.post_ln"),
    ("visual.patch_embed.proj", "v.patch_embd"),
    ("visual.blocks.", "v.blk."),
    ("attn.proj", "attn_out"),
    ("attn.qkv", "attn_qkv"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
    (".norm", ".ln"),
)


@pytest.fixture
def small_tower(monkeypatch):
    made = qwen_vl.Qwen2VLVisionTransformer
    sizes = {"hidden_size": 64, "num_heads": 2, "num_layers": 2, "intermediate_size": 64}
    monkeypatch.setattr(qwen_vl, "Qwen2VLVisionTransformer", lambda **options: made(**{**options, **sizes}))
    load = comfy.sd.load_clip
    options = checkpoints.small_llama_options("qwen25_7b")
    monkeypatch.setattr(comfy.sd, "load_clip", lambda **named: load(**named, model_options=options))


def split(tower):
    """Split what llama.cpp does not keep as one."""
    out = {}
    for key, value in tower.items():
        if "attn_qkv" in key:
            out |= {key.replace("qkv", part): rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        elif "patch_embd" in key:
            out |= {key: value[:, :, 0].contiguous(), f"{key}.1": value[:, :, 1].contiguous()}
        else:
            out[key] = value
    return out


def blocks_of_rows(tower):
    """Split rows of blocks into three."""
    out = {}
    for key, value in tower.items():
        if "attn_qkv.weight" in key:
            kind, (rows, columns), blocks = value
            parts = zip("qkv", blocks.chunk(3), strict=True)
            out |= {key.replace("qkv", part): (kind, (rows // 3, columns), some) for part, some in parts}
        else:
            out[key] = value
    return split({key: value for key, value in out.items() if torch.is_tensor(value)}) | {
        key: value for key, value in out.items() if not torch.is_tensor(value)
    }


def encode(clip):
    picture = torch.rand(1, 56, 84, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize("a cat", images=[picture]), return_pooled=True)[0]


@pytest.mark.parametrize("kind", ["Q8_0", None])
def test_a_picture_is_seen_as_with_the_dequantised_weights(kind, small_tower, tmp_path):
    """The file beside the encoder has its name, whatever the quantisation of the two."""
    path = checkpoints.small_llama(tmp_path / "whole.safetensors", "qwen25_7b")
    tensors = comfy.utils.load_torch_file(path)
    seen = {key: value for key, value in tensors.items() if key.startswith("visual.")}
    read = {key: value for key, value in tensors.items() if key not in seen}
    written, stands_for = quantised_copy(read, "Q8_0")
    metadata = {"general.architecture": "qwen2vl"}
    gguf = write_gguf(tmp_path / "Qwen2.5-VL-7B-Q4_K_M.gguf", renamed(written, ENCODER), metadata)
    if kind is None:
        tower, numbers = split(renamed(seen, TOWER)), seen
    else:
        tower, numbers = quantised_copy(seen, kind)
        tower = blocks_of_rows(renamed(tower, TOWER))
    beside = {"general.architecture": "clip", "general.type": "mmproj"}
    alone = write_gguf(tmp_path / "Qwen2.5-VL-7B-mmproj-F16.gguf", tower, beside)
    with pytest.raises(SourceError, match="architecture 'clip' are not read"):
        comfy_load.load_clip([alone], "qwen_image")
    plain = checkpoints.write(tmp_path / "plain.safetensors", {**stands_for, **numbers})
    classic = comfy.sd.load_clip(ckpt_paths=[plain], clip_type=comfy.sd.CLIPType.QWEN_IMAGE)
    wanted = encode(classic)
    for fraction in (1.0, 0.25):
        ours = comfy_load.load_clip([gguf], "qwen_image", budget(classic.patcher, fraction))
        assert_same(encode(ours), wanted)


def test_without_a_tower_a_picture_is_an_error_and_a_text_is_none(small_tower, tmp_path):
    tensors = comfy.utils.load_torch_file(checkpoints.small_llama(tmp_path / "whole.safetensors", "qwen25_7b"))
    read = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
    gguf = write_gguf(tmp_path / "qwen.gguf", renamed(read, ENCODER), {"general.architecture": "qwen2vl"})
    clip = comfy_load.load_clip([gguf], "qwen_image")
    clip.encode_from_tokens(clip.tokenize("a cat"))
    with pytest.raises(SourceError, match="the file has no such tensor"):
        encode(clip)
