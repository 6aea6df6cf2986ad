"""What a format of ComfyUI's consists of, whether this ComfyUI reads it, and whether a device multiplies in it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.quant_ops
import torch
from comfy.quant_ops import QUANT_ALGOS, get_layout_class

from ...first_use.verdict import FP8, INT8, Verdict

Stored = Any  # ComfyUI's QuantizedTensor
# Rotations go over so many columns at a time, the most that divide them. They are powers of 4.
ROTATIONS = (256, 64, 16)
# Columns that share a scale. ComfyUI reads the first from the file, the others are their format's.
W4A8_GROUP, MXFP8_BLOCK, NVFP4_BLOCK = 16, 32, 16
# What rows and columns must be divisible by, so that no format has to fill them up.
MULTIPLE = 32


class Piece(NamedTuple):
    """One of the tensors that a weight consists of."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return its bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def empty(self, device: Any) -> torch.Tensor:
        """Make it, without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Format:
    """A format for all quantised layers of a model.

    algorithm: ComfyUI's name of it. bits: of a number. rotated: whether columns are rotated before they are rounded.
    """

    name: str
    algorithm: str
    bits: int
    rotated: bool = False

    @property
    def known(self) -> bool:
        """Say whether this ComfyUI reads files in the format."""
        if self.algorithm not in QUANT_ALGOS or self._layout is None:  # no comfy-kitchen that ComfyUI can use
            return False
        fields = {field.name for field in dataclasses.fields(self._layout.Params)}
        return not self.rotated or "convrot_groupsize" in fields

    @property
    def columns(self) -> int:
        """Return what the columns of a weight must be a multiple of. comfy-kitchen's kernels of W4A8 rotate 256."""
        return ROTATIONS[0] if self.algorithm == "asym_w4a8_int8" else MULTIPLE

    @property
    def layout_name(self) -> str:
        """Return comfy-kitchen's name of the layout."""
        return str(QUANT_ALGOS[self.algorithm]["comfy_tensor_layout"])

    @property
    def _layout(self) -> Any:
        return get_layout_class(self.layout_name)

    def multiplies_on(self, device: torch.device, verdict: Verdict | None = None) -> bool:
        """Say whether ComfyUI multiplies in the format on a device. Where it does not, it dequantises each weight.

        verdict: what is known to be wrong on the device.
        """
        management = comfy.model_management
        if self.algorithm in ("mxfp8", "nvfp4"):
            supports = getattr(management, f"supports_{self.algorithm}_compute", None)
            return supports is not None and bool(supports(device))
        if self.algorithm.startswith("float8"):
            return bool(management.supports_fp8_compute(device)) and (verdict is None or verdict.trusts(FP8))
        return verdict is None or verdict.trusts(INT8)


@dataclass(frozen=True)
class Form:
    """A format for one weight. rotation: columns that are rotated together; 0 for none.

    multiplies: whether the device multiplies in it. input_scale: what the file says that the input is divided by; None
    where it is found anew each time.
    """

    format: Format
    rotation: int
    multiplies: bool = False
    input_scale: float | None = None

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def quantises_input(self) -> bool:
        """Say whether ComfyUI quantises a layer's input in the layout of its weight."""
        return bool(QUANT_ALGOS[self.format.algorithm].get("quantize_input", True))

    def conf(self) -> torch.Tensor:
        """Return what `comfy_quant` of a layer in a file says."""
        settings: dict[str, Any] = {"format": self.format.algorithm}
        if self.format.algorithm == "int8_tensorwise" and self.rotation:
            settings |= {"convrot": True, "convrot_groupsize": self.rotation}
        elif self.rotation:
            settings |= {"group_size": W4A8_GROUP, "convrot_groupsize": self.rotation}
        return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)

    def pieces(self, shape: tuple[int, ...]) -> dict[str, Piece]:
        """Return shape and dtype of the tensors of a weight, by what is added to its key in a file."""
        rows, columns = shape
        numbers, single = QUANT_ALGOS[self.format.algorithm]["storage_t"], Piece((), torch.float32)
        # Scales of blocks lie in tiles of 128 rows and 4 columns.
        tiles = -(-rows // 128) * 128
        if self.format.algorithm == "mxfp8":
            scales = Piece((tiles, -(-columns // (4 * MXFP8_BLOCK)) * 4), torch.float8_e8m0fnu)
            return {"": Piece((rows, columns), numbers), "_scale": scales}
        if self.format.algorithm == "nvfp4":
            scales = Piece((tiles, -(-columns // (4 * NVFP4_BLOCK)) * 4), torch.float8_e4m3fn)
            return {"": Piece((rows, columns // 2), numbers), "_scale": scales, "_scale_2": single}
        if self.format.algorithm == "asym_w4a8_int8":
            return {
                "": Piece((rows, columns // 2), numbers),
                "_s_rel": Piece((rows, columns // W4A8_GROUP), torch.float8_e4m3fn),
                "_s_channel": Piece((rows,), torch.float32),
                "_codebook": Piece((16,), torch.float32),
            }
        scale = Piece((rows, 1), torch.float32) if self.rotation else single
        return {"": Piece((rows, columns), numbers), "_scale": scale}

    def stored(self, pieces: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Stored:
        """Make ComfyUI's quantised tensor of those tensors. dtype: that it behaves like."""
        fields: dict[str, Any] = {"scale": pieces.get("_scale")}
        if self.format.algorithm == "nvfp4":
            fields = {"scale": pieces["_scale_2"], "block_scale": pieces["_scale"]}
        elif self.format.algorithm == "asym_w4a8_int8":
            fields = {name: pieces[f"_{name}"] for name in ("s_channel", "codebook")}
            fields |= {"scale": pieces["_s_rel"], "group_size": W4A8_GROUP, "convrot_groupsize": self.rotation}
        elif self.rotation:
            fields |= {"convrot": True, "convrot_groupsize": self.rotation}
        params = get_layout_class(self.format.layout_name).Params(**fields, orig_dtype=dtype, orig_shape=tuple(shape))
        return comfy.quant_ops.QuantizedTensor(pieces[""], self.format.layout_name, params)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a weight of that shape."""
        return sum(piece.nbytes for piece in self.pieces(shape).values())
