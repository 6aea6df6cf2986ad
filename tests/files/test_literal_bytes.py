"""A written file, byte by byte: what the safetensors format prescribes, spelled out."""

import torch

from spillway.ops.files.deferred import Deferred, Stored
from spillway.ops.files.save_pipeline import save

TENSORS = {
    "mask": torch.tensor([-1, 0, 1], dtype=torch.int8),
    "größe": torch.tensor(1.5, dtype=torch.bfloat16),
    "weight": torch.tensor([[1.0, -2.0]]),
}
FILE = (
    b"\xd8\x00\x00\x00\x00\x00\x00\x00"  # the header has 216 bytes
    b'{"__metadata__":{"format":"pt"},'
    b'"weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    b'"gr\xc3\xb6\xc3\x9fe":{"dtype":"BF16","shape":[],"data_offsets":[8,10]},'
    b'"mask":{"dtype":"I8","shape":[3],"data_offsets":[10,13]}}'
    b"       "  # up to a multiple of 8
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0"  # 1.0, -2.0
    b"\xc0\x3f"  # 1.5
    b"\xff\x00\x01"
)


def test_a_saved_file_is_these_bytes(tmp_path):
    tensors = {key: Deferred.of(Stored(tensor), tuple(tensor.shape), tensor.dtype) for key, tensor in TENSORS.items()}
    save(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert (tmp_path / "x.safetensors").read_bytes() == FILE
