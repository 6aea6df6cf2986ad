"""How exact the formats of 8 and 4 bits are in ComfyUI, with and without a LoRA, and what they take; on the CPU.

    python dev.py bench formats                      # a Flux of 512, four steps
    python dev.py bench formats --hidden 128         # a small one, to see that it runs
    COMFYUI_PATH=... COMFYUI_PYTHON=... python dev.py bench formats --json result.json

Runs in ComfyUI's own Python, found as for its tests; on a CPU ComfyUI computes in fp32. Latents are compared with those
of the file as it is. With a LoRA they are compared with those of the file as it is with that LoRA, which is merged into
the original weights before they are rounded, or stays beside the rounded ones. A file that was saved in the format is
sampled by ComfyUI itself, which merges the LoRA into the rounded weights and rounds them again, and here with the LoRA
beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from harness import comfyui, report
from harness.laps import Laps
from harness.pack import load_pack
from harness.race import must_have_run, solo

FILE, LORA, FOUND = "flux.safetensors", "lora.safetensors", "found.json"
# How a LoRA is applied, and the choice of a policy.
LORAS = {"merged": "merge", "beside": "side branch"}

# -- in ComfyUI's Python


def write_files(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui, args.base)
    from kit.comfyui import checkpoints

    with laps.lap("write"):
        path = checkpoints.flux(str(args.base / FILE), hidden=args.hidden, depth=2, depth_single=4)
        checkpoints.lora(str(args.base / LORA), path, rank=16)


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    """Sample with the file as it is and with each format, and note how far the latents are from each other."""
    comfyui.start_comfyui(args.comfyui, args.base)
    import comfy.sd
    import comfy.utils

    load_pack()
    from kit.comfyui import sampling
    from spillway.patcher.comfyui.loading.load import load_diffusion_model
    from spillway.patcher.comfyui.quantise.formats import FORMATS
    from spillway.patcher.comfyui.saving.save import save_model
    from spillway.patcher.policy import Policy

    torch.set_num_threads(args.threads)
    path = str(args.base / FILE)
    lora = comfy.utils.load_torch_file(str(args.base / LORA))

    def with_lora(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0]

    def sampled(model: Any) -> torch.Tensor:
        return sampling.sample(model, steps=args.steps, width=args.size, height=args.size).double().flatten()

    def latents(name: str, mode: str | None = None) -> tuple[torch.Tensor, Any]:
        model = load_diffusion_model(path, name, Policy(int8_lora=mode or "auto"))  # type: ignore[arg-type]
        return sampled(model if mode is None else with_lora(model)), model

    def off(one: torch.Tensor, other: torch.Tensor) -> float:
        return 1 - float(torch.nn.functional.cosine_similarity(one, other, dim=0))

    with torch.inference_mode(), laps.lap("sample"):
        wanted, patched = latents("default")[0], latents("default", "merge")[0]
        rows: dict[str, dict[str, Any]] = {"default, without the LoRA": {"beside": off(wanted, patched)}}
        for name in ["int8", *FORMATS]:
            result, model = latents(name)
            quantised = [p for bundle in model.dynamic.bundles for p in bundle.params if p.quantisation is not None]
            weights = [(p.source.float(), p.quantisation) for p in quantised]
            errors = [float((form.restored(w) - w).norm() / w.norm()) for w, form in weights]
            rows[name] = {
                "alone": off(result, wanted),
                "bytes": model.model_size(),
                "weights": sum(errors) / len(errors),
            }
            for how, mode in LORAS.items():
                rows[name][how] = off(latents(name, mode)[0], patched)
            saved = str(args.base / f"{name}.safetensors")
            save_model(saved, load_diffusion_model(path), dtype="int8_tensorwise" if name == "int8" else name)
            of_comfyui = comfy.sd.load_diffusion_model(saved)
            rows[name]["file"] = off(sampled(of_comfyui), wanted)
            rows[name]["into file"] = off(sampled(with_lora(of_comfyui)), patched)
            ours = load_diffusion_model(saved, policy=Policy(int8_lora="side branch"))
            rows[name]["beside file"] = off(sampled(with_lora(ours)), patched)
    (args.base / FOUND).write_text(json.dumps(rows))


# -- in the parent


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("", "bytes", "error of a weight", "1 - cosine", "LoRA beside", "LoRA merged", "saved, in ComfyUI")
    columns = (*head, "LoRA on that", "that / beside", "LoRA beside that, here")
    lines = []
    for name, row in rows.items():
        grows = f"{row['into file'] / row['beside']:.1f}" if "into file" in row else ""
        size = f"{row['bytes'] / 1e6:.1f} MB" if "bytes" in row else ""
        error = f"{100 * row['weights']:.2f} %" if "weights" in row else ""
        far = [f"{row[key]:.1e}" if key in row else "" for key in ("alone", "beside", "merged", "file", "into file")]
        here = f"{row['beside file']:.1e}" if "beside file" in row else ""
        lines.append((name, size, error, *far, grows, here))
    return report.table(columns, lines)


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    nbytes = (args.base / FILE).stat().st_size
    must_have_run(solo("formats", command("formats"), 1, args.threads))
    rows = json.loads((args.base / FOUND).read_text())
    about = (
        f"Flux of {args.hidden}, {nbytes / 1e6:.0f} MB in bf16, random weights; {args.steps} steps of {args.size} x "
    )
    about += f"{args.size}, in ComfyUI, which computes in fp32; a LoRA of rank 16 on every matrix"
    return comfyui.Outcome((about, table(rows)), {"file_bytes": nbytes, "size": args.size, "results": rows})


def main() -> int:
    parser = comfyui.parser(__doc__)
    comfyui.add_flux(parser, 512, "512 is 73 MB (default)", size=64)
    parser.add_argument("--steps", type=int, default=4)
    return comfyui.run(parser.parse_args(), run_contestant, measure, write=write_files)


if __name__ == "__main__":
    sys.exit(main())
