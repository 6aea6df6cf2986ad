"""Probing: what a file is, from its header, quickly; and what is wrong with it."""

import os
import struct
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from kit.pack import ROOT
from spillway.ops.files.probe import probe
from spillway.ops.files.safetensors_header import SourceError


def written(path, tensors, metadata=None):
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("keys", "kind", "architecture"),
    [
        (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "diffusion model", "Flux"),
        (
            ["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"],
            "diffusion model",
            "Stable Diffusion 1",
        ),
        (["a.lora_up.weight", "a.lora_down.weight", "a.alpha"], "LoRA", ""),
        (["unet.a.lora.up.weight", "unet.a.lora.down.weight"], "LoRA", ""),
        (["a.lora_A.weight", "a.lora_B.weight", "b.diff_b"], "LoRA", ""),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "VAE", ""),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.k.weight"], "text encoder", "T5"),
        (["text_model.embeddings.token_embedding.weight"], "text encoder", "CLIP"),
        (["something.else"], "of a kind unknown to Spillway", ""),
        (["control_model.input_hint_block.0.weight", "control_model.a"], "ControlNet", ""),
    ],
)
def test_kinds(keys, kind, architecture, tmp_path):
    found = probe(written(tmp_path / "x", {key: torch.zeros(2, 768) for key in keys}))
    assert (found.kind, found.architecture) == (kind, architecture)
    assert found.parameters == len(keys) * 2 * 768 and found.file_bytes == (tmp_path / "x").stat().st_size


def test_a_checkpoint(tmp_path):
    keys = [
        "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
        "model.diffusion_model.single_blocks.0.linear1.weight",
        "first_stage_model.decoder.conv_in.weight",
        "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight",
    ]
    found = probe(written(tmp_path / "x", {key: torch.zeros(2) for key in keys}, {"modelspec.title": "A" * 200}))
    assert (found.kind, found.architecture) == ("checkpoint", "Flux")
    assert found.parts == ["diffusion model, Flux", "VAE", "text encoder, CLIP"]
    assert f"modelspec.title: {'A' * 100}… (200 characters)" in found.words


def test_quantised(tmp_path):
    tensors = {
        "a.weight": torch.zeros(4, 8, dtype=torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(1.0),
        "a.comfy_quant": torch.zeros(20, dtype=torch.uint8),
        "b.weight": torch.zeros(4, 8, dtype=torch.int8),
        "b.weight_scale": torch.tensor(1.0),
        "c.weight": torch.zeros(4, 4, dtype=torch.uint8),
        "c.weight_scale": torch.zeros(4, dtype=torch.uint8),
        "c.weight_scale_2": torch.tensor(1.0),
        "d.weight": torch.zeros(4, 8),
    }
    found = probe(written(tmp_path / "x", tensors))
    assert found.quantisation == {"fp8_e4m3fn scaled": 1, "int8": 1, "nvfp4": 1} and found.parameters == 4 * 32
    conf = '{"layers": {"d": {"format": "float8_e4m3fn"}}}'
    found = probe(written(tmp_path / "y", {"d.weight": torch.zeros(2)}, {"_quantization_metadata": conf}))
    assert found.quantisation == {"float8_e4m3fn": 1}
    with pytest.raises(SourceError, match="_quantization_metadata are not JSON"):
        probe(written(tmp_path / "z", {"d.weight": torch.zeros(2)}, {"_quantization_metadata": "{"}))


def test_the_ranks_of_a_lora(tmp_path):
    tensors = {f"{name}.lora_down.weight": torch.zeros(rank, 9) for name, rank in (("a", 4), ("b", 4), ("c", 16))}
    tensors |= {f"{name}.lora_up.weight": torch.zeros(9, rank) for name, rank in (("a", 4), ("b", 4), ("c", 16))}
    found = probe(written(tmp_path / "x", tensors))
    assert found.ranks == {4: 2, 16: 1} and "ranks: 4 (2 layers), 16 (1 layers)" in found.words


def test_only_the_header_is_read(tmp_path):
    """In milliseconds, whatever the size; what cannot be read is not."""
    path = written(tmp_path / "x", {f"double_blocks.{index}.w": torch.zeros(64) for index in range(2000)})
    text = path.read_bytes()[8 : 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]]
    nothing = struct.pack("<Q", len(text)) + text
    with open(tmp_path / "large", "wb") as file:
        file.write(nothing)
        file.truncate(1 << 30)  # of no more room than the header, on most systems
    begun = time.perf_counter()
    assert probe(tmp_path / "large").tensors == 2000
    assert time.perf_counter() - begun < 1.0


@pytest.mark.parametrize(
    ("data", "because"),
    [
        (b"", "has 0 bytes"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file|truncated inside"),
        (struct.pack("<Q", 4) + b"{]}!", "not JSON"),
        (struct.pack("<Q", 20) + b'{"a":', "truncated inside its header"),
    ],
)
def test_malformed(data, because, tmp_path):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SourceError, match=because):
        probe(tmp_path / "x")


def test_truncated(tmp_path):
    path = written(tmp_path / "x", {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="truncated: tensor 'a' ends at"):
        probe(path)


def test_from_the_command_line(tmp_path):
    """Without torch: it answers before a torch would be imported."""
    path = written(tmp_path / "x.safetensors", {"a.lora_up.weight": torch.zeros(8, 2)})
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, str(ROOT / "dev.py"), "probe", str(path), str(tmp_path / "no")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(hidden)})
    assert done.returncode == 1
    assert done.stdout.startswith("x.safetensors: LoRA\n") and "16 parameters" in done.stdout
    assert done.stderr.strip().endswith("no: no such file.")
