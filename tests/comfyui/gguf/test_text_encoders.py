"""Text encoders from GGUF files with llama.cpp's names, beside ComfyUI's own with the same weights in bf16."""

import comfy.sd
import comfy.utils
import pytest
import torch

from kit.comfyui import checkpoints
from kit.comfyui.pairs import assert_same, budget
from kit.comfyui.sampling import text_encode
from kit.gguf_files import quantised_copy, random_blocks, write_gguf
from spillway.ops.files.safetensors_header import SourceError
from spillway.ops.gguf.weight import GgufWeight
from spillway.patcher.comfyui.loading import load as comfy_load

TEXT = "a cat in a hat, (very large:1.2)"
# The model's names and llama.cpp's, in the order in which they are replaced.
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
QWEN = (
    ("model.layers.", "blk."),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.", "attn_"),
    ("mlp.", "ffn_"),
    ("_proj", ""),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
)
ENCODERS = {
    "t5": ("t5xxl_small", T5, "ltxv", lambda: checkpoints.T5XXL_SMALL_OPTIONS),
    "qwen3": ("qwen3_06b", QWEN, "stable_diffusion", lambda: checkpoints.small_options(qwen_layers=2)),
}


@pytest.mark.parametrize("architecture", ENCODERS)
def test_conditioning_is_that_of_the_dequantised_weights(architecture, checkpoint, tmp_path, monkeypatch):
    kind, names, clip_type, options = ENCODERS[architecture]
    tensors = comfy.utils.load_torch_file(checkpoint(kind))
    written, stands_for = quantised_copy(tensors, "Q8_0")

    def renamed(key):
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        return key

    metadata = {"general.architecture": architecture}
    gguf = write_gguf(tmp_path / "encoder.gguf", {renamed(key): value for key, value in written.items()}, metadata)
    plain = checkpoints.write(tmp_path / "encoder.safetensors", stands_for)
    original = comfy.sd.load_clip
    monkeypatch.setattr(comfy.sd, "load_clip", lambda **named: original(**named, model_options=options()))
    classic = original([plain], clip_type=comfy.sd.CLIPType[clip_type.upper()], model_options=options())
    wanted = text_encode(classic, TEXT)
    for fraction in (1.0, 0.25):
        ours = comfy_load.load_clip([gguf], clip_type, budget(classic.patcher, fraction))
        assert_same(text_encode(ours, TEXT), wanted)
        bundles = ours.patcher.dynamic.bundles
        assert sum(isinstance(param.source, GgufWeight) for bundle in bundles for param in bundle.params) > 10


@pytest.mark.parametrize(
    ("architecture", "rows", "words"),
    [("gemma3", 64, "architecture 'gemma3' are not read from GGUF files. Known: t5"), ("t5", 256384, "this is a UMT5")],
)
def test_what_cannot_be_made_of_a_file_is_said(architecture, rows, words, tmp_path):
    table = {"token_embd.weight": ("Q8_0", (rows, 32), random_blocks("Q8_0", rows * 32))}
    path = write_gguf(tmp_path / "encoder.gguf", {**table, "a": torch.ones(1)}, {"general.architecture": architecture})
    with pytest.raises(SourceError, match=words):
        comfy_load.load_clip([path], "wan")
