"""Compiles the transformer blocks of Spillway's models with torch.compile. Their weights stay outside the graph."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import comfy.model_management
import torch

from ....ops.compile.block_compiler import BlockCompiler
from ....ops.compile.compiled_function import (
    CompileSettings,
)
from ...dynamic_model import DynamicModel
from .blocks import prepare
from .products import traceable_products

log = logging.getLogger("spillway")

WHO = "INT8 Lazy Torch Compile"
# ComfyUI's own node removes wrappers of this key before it sets its own, so the last node of a chain compiles.
WRAPPER_KEY = "torch.compile"
INTERRUPT = (comfy.model_management.InterruptProcessingException,)


@dataclasses.dataclass(frozen=True)
class CompileRequest:
    """The inputs of the node. dynamic None: 'auto'."""

    backend: str = "inductor"
    fullgraph: bool = False
    mode: str = "default"
    dynamic: bool | None = True
    blocks_only: bool = True
    cache_size_limit: int = 640
    use_guard_filter: bool = True
    log_compile: bool = True


# The modes without CUDA graphs. A CUDA graph replays fixed addresses, and would read memory that holds other weights.
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def lifted_settings(request: CompileRequest) -> tuple[CompileSettings, list[str]]:
    """Translate a request for blocks whose weights are lent. Says in words what is done otherwise than asked."""
    words = []
    backend, mode = request.backend, WITHOUT_GRAPHS.get(request.mode, request.mode)
    if backend == "cudagraphs":
        backend = "inductor"
        words.append("backend cudagraphs replays fixed addresses, which lent weights do not have: inductor is used")
    if mode != request.mode:
        words.append(f"mode {request.mode} uses CUDA graphs, which need fixed addresses: {mode} is used")
    if not request.blocks_only:
        words.append(
            "the whole model as one graph would need all weights at once, so that none could be offloaded: its "
            "transformer blocks are compiled one by one"
        )
    settings = CompileSettings(
        backend, mode, request.fullgraph, request.dynamic, request.cache_size_limit, traceable_products
    )
    return settings, words


class SharedCompilers:
    """Keeps the compilers of one model, by request, so that its clones share what is compiled."""

    def __init__(self) -> None:
        self._compilers: dict[CompileRequest, BlockCompiler] = {}

    def use(self, dynamic: DynamicModel, request: CompileRequest | None) -> None:
        """Have the blocks of an engine compiled as `request` says, or not at all. Called when a patcher is loaded."""
        blocks = dynamic.blocks
        if request is None or request.cache_size_limit == 0:
            for block in blocks:
                block.compute = None
            if request is not None:
                dynamic.ledger.decide_once(f"{WHO}: dynamo_cache_size_limit is 0, so nothing is compiled.")
            return
        compiler = self._compilers.get(request)
        if compiler is None or compiler.ledger is not dynamic.ledger:
            settings, words = lifted_settings(request)
            for text in words:
                dynamic.ledger.decide(f"{WHO}: {text}.")
            if not blocks:
                dynamic.ledger.decide(f"{WHO}: this model has no transformer blocks; running uncompiled.")
            compiler = self._compilers[request] = BlockCompiler(
                settings,
                dynamic.ledger,
                who=WHO,
                log_compile=request.log_compile,
                prepare=functools.partial(prepare, ignore=request.use_guard_filter),
                passes=INTERRUPT,
            )
        compiler.refresh()
        compiler.attach(blocks)


def refuse_compiled(model: torch.nn.Module, name: str, patch: Any) -> bool:
    """Whether an object patch puts a compiled module in the place of a part of ours. If so, warns and stays without it.

    The compiled module would give the weights inside of it other names, and LoRAs that go by name would miss them.
    """
    if not hasattr(patch, "_orig_mod"):  # torch's OptimizedModule, without importing the compiler
        return False
    log.warning(
        "[Spillway] %s: another node compiles '%s' in place, which would hide its weights from LoRAs: it runs "
        "uncompiled. %s compiles it.",
        type(model).__name__,
        name,
        WHO,
    )
    return True
