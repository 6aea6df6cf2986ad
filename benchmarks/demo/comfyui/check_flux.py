"""Check that ``demo/flux.py`` computes what ComfyUI's own Flux computes, on the same small file and inputs, in fp32.

Run it with ComfyUI's Python:  PY benchmarks/demo/comfyui/check_flux.py COMFYUI_DIR [--checkpoint FILE]
With --checkpoint it also loads that file in ComfyUI and compares the names and shapes of all its tensors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from demo import random_weights
from demo.checkpoint import fills_of
from demo.flux import Flux, FluxConfig, config_from_keys
from demo.sampling import image_ids

TOLERANCE = 1e-4
SMALL = FluxConfig(hidden_size=256, depth=2, depth_single=3, context_dim=512)
ROWS, COLUMNS, TEXT, BATCH = 4, 6, 7, 2  # image tokens down and across, text tokens, images


def comfyui_model(path: Path) -> torch.nn.Module:
    """Load ComfyUI's module for a checkpoint, in fp32 on the CPU."""
    import comfy.sd

    patcher = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    return patcher.model.diffusion_model


def our_model(path: Path) -> Flux:
    """Load our module with the same file's weights, in fp32."""
    import comfy.utils

    weights = comfy.utils.load_torch_file(str(path))
    with torch.device("meta"):
        model = Flux(config_from_keys(weights))
    model.load_state_dict({key: weight.float() for key, weight in weights.items()}, assign=True)
    return model


def largest_difference(path: Path) -> float:
    """Return the largest absolute difference of the two models' outputs, which are of order one."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 16, 2 * ROWS, 2 * COLUMNS, generator=generator)
    context = torch.randn(BATCH, TEXT, SMALL.context_dim, generator=generator)
    pooled = torch.randn(BATCH, SMALL.vector_dim, generator=generator)
    time, guidance = torch.tensor([0.7, 0.31]), torch.tensor([3.5, 2.0])
    expected = comfyui_model(path)(latents, time, context, pooled, guidance)

    # ComfyUI takes latents as images; tokens hold a 2 x 2 patch, channel first.
    packed = latents.reshape(BATCH, 16, ROWS, 2, COLUMNS, 2).permute(0, 2, 4, 1, 3, 5).reshape(BATCH, -1, 64)
    ids = image_ids(ROWS, COLUMNS).expand(BATCH, -1, -1)
    out = our_model(path)(packed, ids, context, torch.zeros(BATCH, TEXT, 3), time, pooled, guidance)
    out = out.reshape(BATCH, ROWS, COLUMNS, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)
    return float((out - expected).abs().max())


def tensor_names_differ(path: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Return names and shapes that only the file or only ComfyUI's model has."""
    import comfy.utils

    # ComfyUI calls the weight of an RMS norm "weight"; Flux.1 files call it "scale".
    in_file = {
        (key.replace("_norm.scale", "_norm.weight"), tuple(weight.shape))
        for key, weight in comfy.utils.load_torch_file(str(path)).items()
    }
    return in_file ^ {(key, tuple(weight.shape)) for key, weight in comfyui_model(path).state_dict().items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args()
    # ComfyUI reads its flags from the command line when it is imported, and must be told of the CPU before it looks.
    sys.path.insert(0, str(args.comfyui.expanduser().resolve()))
    sys.argv = sys.argv[:1]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        small = random_weights.ensure(Path(folder) / "small.safetensors", fills_of(SMALL), {}, seed=1)
        difference = largest_difference(small)
        print(f"largest difference from ComfyUI: {difference:g} (allowed: {TOLERANCE:g})")
        odd = tensor_names_differ(args.checkpoint) if args.checkpoint else set()
    if odd:
        print(f"tensors that only one side has: {sorted(odd)}")
    return 0 if difference <= TOLERANCE and not odd else 1


if __name__ == "__main__":
    sys.exit(main())
