"""Text encoders from GGUF files with llama.cpp's names, beside ComfyUI's own with the same weights in bf16."""

import base64
import json
from dataclasses import dataclass, field

import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.text_encoders import hunyuan_video

from kit.comfyui import checkpoints, spiece
from kit.comfyui.pairs import assert_same, budget
from kit.comfyui.sampling import text_encode
from kit.gguf_files import LAYERS, T5, quantised_copy, random_blocks, renamed, write_gguf
from spillway.ops.files.safetensors_header import SourceError
from spillway.ops.gguf import gguf_map
from spillway.ops.gguf.weight import GgufWeight
from spillway.ops.parts.open_map import open_map
from spillway.patcher.comfyui.loading import load as comfy_load

TEXT = "a cat in a hat,  \ufb01ve times (very large:1.2)"
# The model's names and llama.cpp's, in the order in which they are replaced.
GEMMA = (
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
)
LLAMA = (*GEMMA, *LAYERS)


@dataclass
class Encoder:
    """kind: a function of checkpoints, called with `made`. pieces: of its sentencepiece model, if it needs one.

    rows: that llama.cpp keeps of the table. clip_l: ComfyUI reads the encoder as the second of two, behind a CLIP-L.
    """

    kind: str
    names: tuple
    type: str
    options: object
    made: dict = field(default_factory=dict)
    pieces: str = ""
    rows: int = 0
    clip_l: bool = False


def llama(name, names, type="stable_diffusion", **others):
    options = lambda: {**checkpoints.small_llama_options(name), **checkpoints.small_options(clip_layers=2)}  # noqa: E731
    return Encoder("small_llama", names, type, options, {"name": name}, **others)


ENCODERS = {
    "t5": Encoder("t5xxl_small", T5, "ltxv", lambda: checkpoints.T5XXL_SMALL_OPTIONS),
    "umt5": Encoder("umt5_small", T5, "ace", lambda: {"_model_config": checkpoints.UMT5_SMALL}, pieces="unigram"),
    "qwen3": Encoder(
        "qwen3_06b",
        (("post_attention_layernorm", "ffn_norm"), *LLAMA),
        "stable_diffusion",
        lambda: checkpoints.small_options(qwen_layers=2),
    ),
    "llama": llama("llama", (("post_attention_layernorm", "ffn_norm"), *LLAMA), "hunyuan_video", clip_l=True),
    "gemma2": llama("gemma2_2b", LLAMA, pieces="bpe"),
    "gemma3": llama("gemma3_4b", LLAMA, pieces="bpe", rows=262144),
}


def paired(key, entry):
    """Put the rows of queries and keys into llama.cpp's order: in each head one of the first half, one of the other."""
    kind, shape, blocks = entry
    heads = {"q": 2, "k": 1}[key.split("_proj")[0][-1]]
    rows = blocks.view(heads, 2, shape[0] // heads // 2, -1).transpose(1, 2)
    return kind, shape, rows.reshape(blocks.shape)


def as_llama_cpp(architecture, written):
    """Change numbers as llama.cpp's converter does."""
    for key, value in written.items():
        if architecture == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            written[key] = paired(key, value)
        elif architecture.startswith("gemma") and key.endswith("norm.weight"):
            written[key] = value.float() + 1
    return written


class Words:
    """Stands in for Llama's tokenizer, which some copies of ComfyUI lack, and which is the same on both sides here."""

    @staticmethod
    def from_pretrained(_):
        return Words()

    def __call__(self, text):
        return {"input_ids": [128000, *(sum(word.encode()) % 256 for word in text.split())]}

    def get_vocab(self):
        return {chr(number): number for number in range(256)}


@pytest.fixture(autouse=True)
def words(monkeypatch):
    monkeypatch.setattr(hunyuan_video, "LlamaTokenizerFast", Words)


@pytest.fixture
def files(checkpoint, tmp_path, monkeypatch):
    """`files("umt5")`: its GGUF files, and safetensors files of what they stand for."""

    def clip_l():
        """As another program writes it, which keeps the model's names."""
        written, stands_for = quantised_copy(comfy.utils.load_torch_file(checkpoint("clip_l", layers=2)), "Q5_0")
        gguf = write_gguf(tmp_path / "clip_l.gguf", written, {"general.architecture": "pig"})
        return gguf, checkpoints.write(tmp_path / "clip_l.safetensors", stands_for)

    def make(architecture, kind="Q8_0"):
        encoder = ENCODERS[architecture]
        tensors = comfy.utils.load_torch_file(checkpoint(encoder.kind, **encoder.made))
        written, stands_for = quantised_copy(tensors, kind)
        metadata = {"general.architecture": architecture.replace("umt5", "t5")}
        if architecture == "llama":
            metadata |= {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
        table = next(key for key in ("shared.weight", "model.embed_tokens.weight") if key in written)
        if encoder.rows:
            blocks_kind, (_, columns), blocks = written[table]
            count = len(blocks) * encoder.rows // written[table][1][0]
            written[table] = (blocks_kind, (encoder.rows, columns), blocks[:count])
        if encoder.pieces:
            raw = spiece.train(encoder.pieces)
            metadata |= spiece.metadata(raw, encoder.pieces, 1100)
            stands_for["spiece_model"] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        named = renamed(as_llama_cpp(architecture, written), encoder.names)
        original = comfy.sd.load_clip
        monkeypatch.setattr(comfy.sd, "load_clip", lambda **named: original(**named, model_options=encoder.options()))
        gguf = write_gguf(tmp_path / f"{architecture}.gguf", named, metadata)
        both = gguf, checkpoints.write(tmp_path / f"{architecture}.safetensors", stands_for)
        return tuple(zip(*[clip_l(), both] if encoder.clip_l else [both], strict=True))

    return make


def comfyui_clip(paths, architecture):
    return comfy.sd.load_clip(ckpt_paths=list(paths), clip_type=comfy.sd.CLIPType[ENCODERS[architecture].type.upper()])


# T5's names and layers are UMT5's too, in a smaller model.
@pytest.mark.parametrize("architecture", [pytest.param("t5", marks=pytest.mark.slow), *list(ENCODERS)[1:]])
def test_conditioning_is_that_of_the_dequantised_weights(architecture, files, monkeypatch):
    gguf, plain = files(architecture)
    classic = comfyui_clip(plain, architecture)
    texts = (TEXT, f"{spiece.TURN}user\n{TEXT}") if ENCODERS[architecture].pieces else (TEXT,)
    wanted = [text_encode(classic, text) for text in texts]
    assert all(expected[0].std() > 0.1 for expected in wanted)
    headers, parse = [], gguf_map.parse_header
    monkeypatch.setattr(gguf_map, "parse_header", lambda *args: headers.append(args) or parse(*args))
    fractions = (1.0, 0.5, 0.25, 0.0)
    for fraction in fractions:
        ours = comfy_load.load_clip(gguf, ENCODERS[architecture].type, budget(classic.patcher, fraction))
        for text, expected in zip(texts, wanted, strict=True):
            assert ours.tokenize(text) == classic.tokenize(text)
            assert_same(text_encode(ours, text), expected)
        bundles = ours.patcher.dynamic.bundles
        assert sum(isinstance(param.source, GgufWeight) for bundle in bundles for param in bundle.params) > 10
    assert len(headers) == len(fractions) * len(gguf)  # once a load


def test_a_lora_stays_beside_the_blocks_of_a_text_encoder(files):
    """Also where the file has a weight's rows in another order than the model."""
    gguf, plain = files("llama")
    classic, ours = comfyui_clip(plain, "llama"), comfy_load.load_clip(gguf, "hunyuan_video")
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for part, rows in (("q", 256), ("v", 128)):
        name = f"text_encoders.llama.transformer.model.layers.0.self_attn.{part}_proj"
        lora[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
        lora[f"{name}.lora_down.weight"] = torch.randn(4, 64, generator=generator) * 0.2
    without = text_encode(classic, TEXT)[0]
    wanted, got = (
        text_encode(comfy.sd.load_lora_for_models(None, clip, lora, 0, 0.5)[1], TEXT)[0] for clip in (classic, ours)
    )
    assert float((wanted - without).norm() / without.norm()) > 0.05
    assert float((got - wanted).norm() / (wanted - without).norm()) < 0.05


def characters_of_bytes():
    """GPT-2's: printable ones stand for themselves, the others for those from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}


def test_a_tekken_tokenizer_is_made_of_the_token_lists(tmp_path):
    """Mistral's, of which the file has every token as characters that stand for bytes."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" c", b" cat", "\u00e9".encode()]
    special = [f"<SPECIAL_{number}>" for number in range(20)] + ["[INST]"]
    wanted = {
        "config": {"default_vocab_size": len(special) + len(pieces), "default_num_special_tokens": len(special)},
        "vocab": [{"rank": rank, "token_bytes": base64.b64encode(piece).decode()} for rank, piece in enumerate(pieces)],
        "special_tokens": [{"rank": rank, "token_str": token} for rank, token in enumerate(special)],
    }
    shown = characters_of_bytes()
    metadata = {
        "general.architecture": "llama",
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": special + ["".join(shown[byte] for byte in piece) for piece in pieces],
        "tokenizer.ggml.token_type": [spiece.CONTROL] * len(special) + [spiece.NORMAL] * len(pieces),
    }
    path = write_gguf(tmp_path / "mistral.gguf", {"token_embd.weight": torch.ones(4, 2)}, metadata)
    made = open_map(path).state_dict()["tekken_model"].numpy().tobytes()
    reason = "this ComfyUI makes its tokenizer with a converter that newer transformers lack"
    tokenizers = pytest.importorskip("comfy.text_encoders.bpe_tokenizer", reason=reason)
    one, other = (tokenizers.from_tekken_json(data) for data in (json.dumps(wanted), made))
    for text in ("the cat", "[INST] th\u00e9 caf\u00e9 \U0001f600[INST]\n"):
        assert one(text)["input_ids"] == other(text)["input_ids"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gemma4"}, "architecture 'gemma4' are not read from GGUF files. Known: t5"),
        ({"tokenizer.ggml.scores": "none"}, "its tokenizer lacks the list 'scores'"),
        ({"tokenizer.ggml.scores": [1.0] * 5}, "has 1100 tokens, 1100 types and 5 scores"),
        ({"tokenizer.ggml.token_type": [9] * 1100}, "has types of tokens that are not known"),
        ({"tokenizer.ggml.tokens": [5] * 1100}, "has numbers in the list 'tokens'"),
    ],
)
def test_what_cannot_be_made_of_a_file_is_said(change, words, tmp_path):
    table = {"token_embd.weight": ("Q8_0", (256384, 32), random_blocks("Q8_0", 256384 * 32)), "a": torch.ones(1)}
    metadata = {"general.architecture": "t5", **spiece.metadata(spiece.train("unigram"), "unigram", 1100), **change}
    path = write_gguf(tmp_path / "encoder.gguf", table, metadata)
    with pytest.raises(SourceError, match=words) as error:
        comfy_load.load_clip([path], "wan")
    assert path in str(error.value)
