"""The rows of `loader_files`: which model, in which format, with a LoRA or without, and how their files are written.

All but the paths runs in ComfyUI's Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FORMATS = ("bf16", "fp16", "fp8", "scaled fp8", "int8")
# Parts of the names of the large matrices, which are what a quantised file has quantised.
LARGE = {
    "flux": ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "linear1", "linear2"),
    "wan": ("_attn.q", "_attn.k", "_attn.v", "_attn.o", "ffn.0", "ffn.2"),
    "lumina2": ("attention.qkv", "attention.out", "feed_forward.w"),
    "z_image": ("attention.qkv", "attention.out", "feed_forward.w"),
}
WHOLE = "sd15"  # a checkpoint with its text encoder and VAE, as it is in circulation: in fp16


class Row(NamedTuple):
    model: str
    format: str
    lora: bool

    @property
    def whole(self) -> bool:
        return self.model == WHOLE

    def __str__(self) -> str:
        return f"{self.model} {self.format}{' + LoRA' if self.lora else ''}"


ROWS = tuple(
    Row(model, format_, lora)
    for model in (*LARGE, WHOLE)
    for format_ in (("fp16",) if model == WHOLE else FORMATS)
    for lora in (False, True)
)


def file_of(row: Row, base: Path) -> Path:
    folder = "checkpoints" if row.whole else "diffusion_models"
    return base / "models" / folder / f"{row.model}-{row.format.replace(' ', '-')}.safetensors"


def lora_of(row: Row, base: Path) -> Path:
    return base / "models" / "loras" / f"{row.model}.safetensors"


def write(row: Row, base: Path) -> None:
    """Write the row's file and LoRA, where another row has not."""
    import torch

    from kit.comfyui import checkpoints
    from kit.comfyui.quantised import quantised

    path, lora = file_of(row, base), lora_of(row, base)
    path.parent.mkdir(parents=True, exist_ok=True)
    lora.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if row.format in ("bf16", "fp16"):
            _plain(row, path, torch.bfloat16 if row.format == "bf16" else torch.float16)
        else:
            plain = file_of(row._replace(format="bf16"), base)
            if not plain.exists():
                _plain(row, plain, torch.bfloat16)
            if row.format == "fp8":
                _fp8(path, plain, LARGE[row.model])
            else:
                kind = {"scaled fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}[row.format]
                quantised(str(path), str(plain), kind, LARGE[row.model])
    if row.lora and not lora.exists():
        checkpoints.lora(str(lora), str(path), rank=16, match="model.diffusion_model" if row.whole else "")


def _plain(row: Row, path: Path, dtype: object) -> None:
    from kit.comfyui import checkpoints

    sizes = {
        "flux": {"hidden": 1536, "context": 4096, "pooled": 768},
        "wan": {"dim": 1024, "ffn": 4096, "layers": 8},
        "lumina2": {"dim": 1152, "layers": 6, "context": 2304},
        "z_image": {"dim": 1280, "layers": 6, "context": 2560},
        "sd15": {"mult": (1, 2, 4), "blocks": 1, "vae_decoder_channels": 64},
    }
    getattr(checkpoints, row.model)(str(path), dtype, **sizes[row.model])


def _fp8(path: Path, plain: Path, large: tuple[str, ...]) -> None:
    """Write the large matrices as fp8 without a scale, as the oldest fp8 files have them."""
    import comfy.utils
    import torch

    from kit.comfyui import checkpoints

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_large = name.endswith(".weight") and any(part in name for part in large)
        return tensor.to(torch.float8_e4m3fn) if is_large else tensor

    checkpoints.write(
        str(path), {name: cast(name, tensor) for name, tensor in comfy.utils.load_torch_file(str(plain)).items()}
    )
