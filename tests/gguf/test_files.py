"""GGUF files: what a header says, and ten thousand damaged ones."""

import random
import re
import struct
import sys
from pathlib import Path

import gguf
import psutil
import pytest
import torch

from kit.gguf_files import random_blocks, write_gguf
from spillway.ops.files.disk_map import DiskMap, SourceError
from spillway.ops.gguf import dequantise
from spillway.ops.gguf.gguf_map import GgufMap
from spillway.ops.gguf.probe import probe
from spillway.ops.gguf.types import IDS, TYPES
from spillway.ops.gguf.weight import GgufWeight
from spillway.ops.parts.open_map import open_map

MUTATIONS = 10_000


def tensors():
    return {
        "blocks.0.weight": ("Q4_K", (8, 256), random_blocks("Q4_K", 8 * 256)),
        "kernel": ("Q8_0", (4, 32), random_blocks("Q8_0", 128)),
        "norm": torch.arange(5.0),
        "half": torch.ones(3, 2, dtype=torch.bfloat16),
    }


METADATA = {
    "comfy.gguf.orig_shape.kernel": [2, 4, 4, 4],
    "tokenizer.ggml.tokens": [f"token {n}" for n in range(1100)],
    "tokenizer.ggml.token_type": [2, 3, 3, 6] * 275,
    "tokenizer.ggml.scores": [float(-n) for n in range(1100)],
    "tokenizer.ggml.precompiled_charsmap": bytes(range(256)) * 5,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.add_space_prefix": True,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 2,
}


@pytest.fixture
def path(tmp_path):
    return write_gguf(tmp_path / "model.gguf", tensors(), METADATA)


def test_tensors_are_those_that_the_reference_reads(path):
    source = open_map(path)
    assert isinstance(source, GgufMap) and source.metadata == {"general.architecture": "flux"}
    assert source.gguf_metadata["tokenizer.ggml.tokens"].length == 1100
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(found) == list(source.keys())
    for name, tensor in found.items():
        ours = source.tensor(name)
        if isinstance(ours, GgufWeight):
            wanted = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(ours.dequantize(), wanted.view(ours.shape).to(torch.bfloat16))
            assert source.spec(name).offset == tensor.data_offset and source.spec(name).nbytes == tensor.n_bytes
        else:
            # The reference gives bf16 as bytes.
            assert bytes(ours.contiguous().view(-1).view(torch.uint8).numpy()) == tensor.data.tobytes()
    assert source.tensor("kernel").shape == (2, 4, 4, 4) and source.tensor("norm").tolist() == [0, 1, 2, 3, 4]


def test_a_file_that_the_reference_has_written(tmp_path):
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    numbers = torch.randn(16, 64)
    quantised = gguf.quants.quantize(numbers.numpy(), gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("a.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("b", numbers.numpy())
    writer.add_array("comfy.gguf.orig_shape.b", [4, 4, 64])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_map(path)
    wanted = torch.from_numpy(gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q5_1))
    assert torch.equal(source.tensor("a.weight").dequantize(), wanted.to(torch.bfloat16))
    assert torch.equal(source.tensor("b"), numbers.view(4, 4, 64))


def test_quantised_weights_stand_for_the_dtype_of_the_rest(tmp_path):
    """fp16 in a file that has some and no bf16."""
    half = {"a": ("Q8_0", (1, 32), random_blocks("Q8_0", 32)), "b": torch.ones(4, dtype=torch.float16)}
    assert open_map(write_gguf(tmp_path / "a.gguf", half)).tensor("a").dtype == torch.float16
    single = {**half, "b": torch.ones(4)}
    assert open_map(write_gguf(tmp_path / "b.gguf", single)).tensor("a").dtype == torch.bfloat16


def test_rows_of_rotary_projections_come_in_the_order_of_the_model(tmp_path):
    """llama.cpp puts each row of a head's first half beside one of the other half."""
    numbers = torch.arange(8 * 32.0).view(8, 32) / 256
    in_file = numbers.view(2, 2, 2, 32).transpose(1, 2).reshape(8, 32)
    quantised = torch.from_numpy(gguf.quants.quantize(in_file.numpy(), gguf.GGMLQuantizationType.Q8_0))
    wanted = {"v": in_file, "output": in_file, "k": numbers, "q": numbers}
    tensors = {f"blk.0.attn_{part}.weight": in_file.half() for part in wanted}
    tensors["blk.1.attn_q.weight"] = ("Q8_0", (8, 32), quantised)
    heads = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 2}
    architecture = {"general.architecture": "llama"}
    source = open_map(write_gguf(tmp_path / "llama.gguf", tensors, {**architecture, **heads}))
    for part, expected in wanted.items():
        name = "o" if part == "output" else part
        assert torch.equal(source.tensor(f"model.layers.0.self_attn.{name}_proj.weight") + 0, expected.half())
    quantised_q = source.tensor("model.layers.1.self_attn.q_proj.weight")
    assert float((quantised_q.dequantize().float() - numbers).abs().max()) < 0.01
    x, ids = torch.randn(3, 32), torch.tensor([1, 6])
    expected = torch.nn.functional.linear(x, quantised_q.dequantize().float())
    assert torch.equal(torch.nn.functional.linear(x, quantised_q), expected)
    rows = torch.nn.functional.embedding(ids, quantised_q)
    assert torch.equal(rows, quantised_q.dequantize()[ids])
    for wrong in (architecture, {**architecture, **heads, "llama.attention.head_count": 3}):
        with pytest.raises(SourceError, match=r"should be a number of heads|which 3 heads do not divide"):
            open_map(write_gguf(tmp_path / "wrong.gguf", tensors, wrong)).state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: b"GGML" + raw[4:], "begins with b'GGUF'"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "version 50331648. Versions 2 and 3"),
        (lambda raw: raw[:8] + struct.pack("<Q", 1 << 40) + raw[16:], "1099511627776 tensors"),
        (lambda raw: raw[:-40], "truncated: tensor 'half' ends at byte"),
        (lambda raw: raw[:60], "truncated inside its header"),
        (lambda raw: raw.replace(b"norm" + struct.pack("<I", 1), b"norm" + struct.pack("<I", 9)), "9 dimensions"),
        (lambda raw: raw.replace(b"half", b"norm"), "two tensors are named 'norm'"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(path, change, words):
    file = Path(path)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(SourceError, match=words) as error:
        open_map(path)
    assert path in str(error.value)


def test_ten_thousand_damaged_files(path, tmp_path):
    """Each gives an error of ours or tensors that lie in the file, and memory stays bounded.

    Most are of a diffusion model. Some are of text encoders, whose tokenizer is made of lists in the header.
    """
    target, raws = tmp_path / "mutated.gguf", [Path(path).read_bytes()] * 8
    projection = {"blk.0.attn_q.weight": ("Q8_0", (8, 32), random_blocks("Q8_0", 256)), **tensors()}
    for architecture in ("gemma2", "llama"):
        metadata = {**METADATA, "general.architecture": architecture}
        raws.append(Path(write_gguf(tmp_path / f"{architecture}.gguf", projection, metadata)).read_bytes())
    assert open_map(tmp_path / "gemma2.gguf").state_dict()["spiece_model"].numel() > 1100 * 10
    rng, process = random.Random(5), psutil.Process()
    before, loaded, errors = process.memory_info().rss, 0, []
    for number in range(MUTATIONS):
        raw = raws[number % len(raws)]
        changed, head = bytearray(raw), raw.index(b"half") + 200
        # The long lists of the tokenizer are skipped over: most of the header's meaning lies around them.
        for _ in range(rng.randrange(1, 4)):
            around = raw.index(b"tokenizer.ggml.eos_token_id") - 40
            places = [(0, 200), (head - 500, head), (around, around + 200), (0, len(raw))]
            at = rng.randrange(*rng.choice(places))
            if rng.random() < 0.5:
                changed[at] = rng.randrange(256)
            else:
                wide = rng.choice([0, 1, 2**31, 2**32 - 1, 2**53, 2**63, 2**64 - 1, rng.randrange(2**64)])
                changed[at : at + 8] = struct.pack("<Q", wide)[: len(changed) - at]
        if rng.random() < 0.2:
            del changed[rng.randrange(len(changed)) :]
        target.write_bytes(changed)
        try:
            source = open_map(target)
            source.state_dict()
        except SourceError as error:
            errors.append(str(error))
            continue
        for name in list(source.keys()):
            spec, tensor = source.spec(name), source.tensor(name)
            assert spec.offset + spec.nbytes <= len(changed)
            if tensor.numel() < 1 << 16:
                tensor.dequantize() if isinstance(tensor, GgufWeight) else tensor.sum()
        loaded += 1
    assert all(str(target) in words for words in errors)
    assert loaded > MUTATIONS // 20 and len(errors) > MUTATIONS // 20
    assert process.memory_info().rss - before < 200 << 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.token_type": [1.0] * 1100}, "other values than whole numbers in the list 'token_type'"),
        ({"tokenizer.ggml.precompiled_charsmap": [0.5]}, "than whole numbers in the list 'precompiled_charsmap'"),
        ({"tokenizer.ggml.scores": ["a"]}, "other values than numbers in the list 'scores'"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, ""),
        ({"tokenizer.ggml.eos_token_id": -(2**31), "tokenizer.ggml.add_space_prefix": "no"}, ""),
    ],
)
def test_a_tokenizer_that_makes_no_sense(change, words, tmp_path):
    """It is an error of ours, or a value that is not needed."""
    metadata = {**METADATA, "general.architecture": "gemma2", **change}
    source = open_map(write_gguf(tmp_path / "gemma2.gguf", tensors(), metadata))
    if not words:
        assert source.state_dict()["spiece_model"].numel() > 1100 * 10
        return
    with pytest.raises(SourceError, match=words):
        source.state_dict()


@pytest.mark.parametrize(
    ("head", "name", "wanted"),
    [
        (struct.pack("<Q", 2) + b"{}", "model.gguf", "model.safetensors"),
        (b"PK\x03\x04" + bytes(100), "model.gguf", "model.ckpt"),
        (b"\x80\x02" + bytes(100), "model.gguf", "model.ckpt"),
        (b"GGUF" + bytes(100), "model.safetensors", "model.gguf"),
    ],
)
def test_a_file_under_the_name_of_another_format_says_which_it_is(head, name, wanted, tmp_path):
    (tmp_path / name).write_bytes(head)
    with pytest.raises(SourceError, match=f"under the name of .*Call it {re.escape(Path(wanted).suffix)}\\.") as error:
        open_map(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_a_type_that_needs_the_package_is_refused_when_it_is_loaded(tmp_path, monkeypatch):
    """And not in the middle of a run. What is in the file is told all the same."""
    blocks = torch.zeros(2, TYPES[IDS["IQ3_S"]].nbytes, dtype=torch.uint8)
    path = write_gguf(tmp_path / "model.gguf", {**tensors(), "small": ("IQ3_S", (2, 256), blocks)})
    assert open_map(path).state_dict()["small"].shape == (2, 256)
    monkeypatch.setitem(sys.modules, "gguf", None)
    dequantise.function_for.cache_clear()
    with pytest.raises(SourceError, match=r"weights of GGUF type IQ3_S need the package 'gguf': install it") as error:
        open_map(path).state_dict()
    assert path in str(error.value)
    assert probe(path).quantisation["IQ3_S"] == 1


def test_other_names_are_safetensors(tmp_path):
    with pytest.raises(SourceError):
        open_map(tmp_path / "model.safetensors")
    assert not issubclass(DiskMap, GgufMap)


def test_probing_tells_what_is_in_a_file(path, tmp_path):
    found = probe(path)
    assert (
        found.kind == "of a kind unknown to Spillway"
        and found.tensors == 4
        and found.quantisation == {"Q4_K": 1, "Q8_0": 1}
    )
    assert found.dtypes["Q4_K"] == (1, 8 * 144) and found.dtypes["F32"] == (1, 20)
    flux = {
        "double_blocks.0.img_attn.qkv.weight": ("Q4_K", (1, 256), random_blocks("Q4_K", 256)),
        "single_blocks.0.linear1.weight": ("Q4_K", (1, 256), random_blocks("Q4_K", 256)),
    }
    found = probe(write_gguf(tmp_path / "flux.gguf", flux))
    assert found.words.startswith("flux.gguf: diffusion model, Flux") and found.parameters == 512
    with pytest.raises(SourceError, match="no such file"):
        probe(tmp_path / "none.gguf")
