"""LoRAs and other weight patches of every kind that ComfyUI reads, for three matrices of the small Flux."""

import math

import comfy.sd
import torch

QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
LINEAR = "diffusion_model.single_blocks.0.linear1"
MLP = "diffusion_model.double_blocks.0.txt_mlp.2"
SHAPES = {QKV: (384, 128), LINEAR: (896, 128), MLP: (128, 512)}


def numbers(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape))) * scale


def forms(name, wrong=(), hidden=128):
    """Make the state dict of a LoRA file of one kind, for three matrices of the small Flux.

    wrong: stems whose tensors are for weights of half the width and height. hidden: the model's width.
    """
    out = {}
    for stem, shape in SHAPES.items():
        rows, columns = (size * hidden // 128 for size in shape)
        if stem in wrong:
            rows, columns = rows // 2, columns // 2
        low_rank = {
            "lora": {"lora_up.weight": (rows, 4), "lora_down.weight": (4, columns)},
            "loha": {
                "hada_w1_a": (rows, 4),
                "hada_w1_b": (4, columns),
                "hada_w2_a": (rows, 4),
                "hada_w2_b": (4, columns),
            },
            "lokr": {"lokr_w1": (8, 8), "lokr_w2": (rows // 8, columns // 8)},
            "glora": {
                "a1.weight": (4, columns),
                "a2.weight": (columns, 4),
                "b1.weight": (4, columns),
                "b2.weight": (rows, 4),
            },
            "oft": {"oft_blocks": (8, rows // 8, rows // 8)},
            "diff": {"diff": (rows, columns), "diff_b": (rows,)},
            "set": {"set_weight": (rows, columns)},
        }["lora" if name == "dora" else name]
        out.update({f"{stem}.{key}": numbers(*shape, scale=0.05) for key, shape in low_rank.items()})
        if name in ("lora", "dora", "loha", "lokr"):
            out[f"{stem}.alpha"] = torch.tensor(2.0)
        if name == "dora":
            out[f"{stem}.dora_scale"] = 1 + numbers(rows, 1, scale=0.1).abs()
    return out


def with_lora(model, lora, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]
