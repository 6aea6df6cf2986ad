"""Compiles a model's transformer blocks when it first samples."""

from __future__ import annotations

import logging
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..patcher.comfyui.compile.classic_models import compile_other
from ..patcher.comfyui.compile.dynamic_models import WHO, WRAPPER_KEY, CompileRequest
from ..patcher.comfyui.loading.load import is_ours
from .checked_node import CheckedNode
from .inputs import CATEGORY

log = logging.getLogger("spillway")

DYNAMIC = {"auto": None, "true": True, "false": False}


class SpillwayLazyTorchCompile(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        # Workflow files keep values by position. Another order of inputs would give each of them the value of another.
        return io.Schema(
            node_id="SpillwayLazyTorchCompile",
            display_name=f"{WHO} (Spillway)",
            category=CATEGORY,
            description="Compiles a model with torch.compile when it first samples. On a model of Spillway's, LoRAs, "
            "their strength, the memory budget and the size of the image recompile nothing.",
            search_aliases=["torch.compile", "TorchCompileModel", "inductor", "compile model", "speed up", "triton"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL. LoRAs may come before or after this node."),
                io.Combo.Input(
                    "backend",
                    options=["inductor", "cudagraphs"],
                    default="inductor",
                    tooltip="inductor writes fast kernels. cudagraphs replays the model's own kernels. Models of "
                    "Spillway's use inductor for both.",
                ),
                io.Boolean.Input(
                    "fullgraph",
                    default=False,
                    tooltip="A block that cannot be compiled in one piece runs uncompiled, instead of in pieces.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"],
                    default="default",
                    tooltip="How long the compiler may search. Models of Spillway's are compiled without CUDA graphs.",
                ),
                io.Combo.Input(
                    "dynamic",
                    options=["auto", "true", "false"],
                    default="true",
                    tooltip="true: one compilation for all image sizes. false: one for each size, each somewhat "
                    "faster. auto: PyTorch decides.",
                ),
                io.Boolean.Input(
                    "compile_transformer_blocks_only",
                    default=True,
                    tooltip="Compiles one block of each kind and uses it for all, instead of the model as a whole.",
                ),
                io.Int.Input(
                    "dynamo_cache_size_limit",
                    default=640,
                    min=0,
                    max=2048,
                    tooltip="How many compiled variants are kept of one function before PyTorch gives up compiling it.",
                ),
                io.Boolean.Input(
                    "use_guard_filter",
                    default=True,
                    tooltip="Does not compile again because transformer options changed: block numbers, the current "
                    "sigma and other things that only patches read.",
                ),
                io.Boolean.Input(
                    "disable_dynamic_vram",
                    default=True,
                    tooltip="Compiles a copy of the model without ComfyUI's dynamic VRAM. Does nothing to models of "
                    "Spillway's, which need no such copy.",
                ),
                io.Boolean.Input(
                    "log_compile", default=True, tooltip="Writes into the log what was compiled, and how long it took."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, compiled when it first samples.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        backend: str,
        fullgraph: bool,
        mode: str,
        dynamic: str,
        compile_transformer_blocks_only: bool,
        dynamo_cache_size_limit: int,
        use_guard_filter: bool,
        disable_dynamic_vram: bool,
        log_compile: bool,
    ) -> io.NodeOutput:
        request = CompileRequest(
            backend=backend,
            fullgraph=fullgraph,
            mode=mode,
            dynamic=DYNAMIC[dynamic],
            blocks_only=compile_transformer_blocks_only,
            cache_size_limit=dynamo_cache_size_limit,
            use_guard_filter=use_guard_filter,
            log_compile=log_compile,
        )
        if not is_ours(model):
            return io.NodeOutput(compile_other(model, request, disable_dynamic_vram))
        clone = model.clone()
        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, WRAPPER_KEY)
        clone.compile_request = request
        if disable_dynamic_vram:
            log.info(
                "[Spillway] %s: disable_dynamic_vram does nothing here: this model is Spillway's, and is compiled with "
                "its weights outside of the compiled code.",
                WHO,
            )
        return io.NodeOutput(clone)
