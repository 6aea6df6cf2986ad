"""Compiled models, through the node and without it."""

from kit.comfyui.loras import with_lora
from spillway.nodes.compile import SpillwayLazyTorchCompile
from spillway.patcher.comfyui.compile.dynamic_models import CompileRequest
from spillway.patcher.policy import Policy

# As a workflow file stores them.
STORED = ["inductor", False, "default", "true", True, 640, True, True, True]
ORDER = [
    "model",
    "backend",
    "fullgraph",
    "mode",
    "dynamic",
    "compile_transformer_blocks_only",
    "dynamo_cache_size_limit",
    "use_guard_filter",
    "disable_dynamic_vram",
    "log_compile",
]
# kinds of blocks in each, and what makes it small
ARCHITECTURES = {
    "flux": (2, {"hidden": 128}),
    "wan": (1, {"dim": 128, "ffn": 128, "layers": 2}),
    "lumina2": (2, {}),
    "sd15_unet": (1, {"mult": (1, 1)}),
}
FAILED = "INT8 Lazy Torch Compile: compile failed; running uncompiled."


def as_stored(model, **changes):
    """Run the node with the values of a workflow file, which go to its inputs by position."""
    values = dict(zip(ORDER[1:], STORED, strict=True))
    return SpillwayLazyTorchCompile.execute(model=model, **{**values, **changes}).args[0]


def compiled(model, **changes):
    """Clone a model so that it traces and guards, and runs the graphs as they were traced."""
    clone = model.clone()
    clone.compile_request = CompileRequest(**{"backend": "eager", **changes})
    return clone


def said(model, text):
    return [line for line in model.dynamic.ledger.decisions if text in line]


def with_strength(model, lora, strength):
    """Attach a LoRA, or nothing at a strength of 0."""
    return with_lora(model, lora, strength) if strength else model


def with_budget(model, fraction):
    clone = model.clone()
    clone.set_policy(Policy(vram_bytes=int(model.dynamic.total_bytes * fraction)))
    return clone
