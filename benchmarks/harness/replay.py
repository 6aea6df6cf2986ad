"""Replay a trace of prompts through ComfyUI's real executor and one of its output caches, with simulated nodes.

Runs in ComfyUI's own Python. A node takes no time: the clock that the caches read is moved on by the seconds that the
trace gives it. Its outputs are real tensors and model patchers of the size that the trace gives, whose memory is never
touched; what is available is the trace's RAM less the outputs that are alive.
"""

from __future__ import annotations

import asyncio
import gc
import json
import types
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from .comfyui import Server

GIB = 1 << 30
MIB = 1 << 20


class Machine:
    """The simulated clock and memory."""

    def __init__(self, ram: int) -> None:
        self.ram = ram
        self.now = 0.0
        self.alive = 0
        self.peak = self.settled = 0

    def settle(self) -> None:
        """Note between two nodes that what is alive now is what the cache chose to keep."""
        self.settled = max(self.settled, self.alive)

    def hold(self, owner: Any, nbytes: int) -> None:
        """Count bytes for as long as an object lives."""
        self.alive += nbytes
        self.peak = max(self.peak, self.alive)
        weakref.finalize(owner, self._release, nbytes)

    def _release(self, nbytes: int) -> None:
        self.alive -= nbytes

    @property
    def available(self) -> int:
        return max(0, self.ram - self.alive)

    def virtual_memory(self) -> Any:
        return types.SimpleNamespace(available=self.available, total=self.ram)


class Log:
    """What ran: seconds in all, and seconds for what had been made before."""

    def __init__(self) -> None:
        self.seconds = self.again = 0.0
        self.runs: Counter[str] = Counter()
        self.made_again: Counter[str] = Counter()
        self.seen: set[str] = set()

    def ran(self, kind: str, identity: str, seconds: float) -> None:
        self.runs[kind] += 1
        self.seconds += seconds
        if identity in self.seen:
            self.again += seconds
            self.made_again[kind] += 1
        self.seen.add(identity)


def read_trace(path: Path) -> dict[str, Any]:
    """Read a trace, and apply every edit to its prompts."""
    trace = json.loads(path.read_text(encoding="utf-8"))
    graphs, prompts = json.loads(json.dumps(trace["workflows"])), []
    for workflow, edits in trace["prompts"]:
        for place, value in edits.items():
            node, _, name = place.partition(".")
            graphs[workflow][node]["inputs"][name] = value
        prompts.append(json.loads(json.dumps(graphs[workflow])))
    return {**trace, "prompts": prompts}


def identity(graph: dict[str, Any], node: str) -> str:
    """Return a text that is the same for nodes that must give the same output."""
    inputs = {
        name: [identity(graph, value[0]), value[1]] if isinstance(value, list) else value
        for name, value in graph[node]["inputs"].items()
    }
    return json.dumps([graph[node]["class_type"], inputs], sort_keys=True)


def node_class(kind: str, cost: dict[str, Any], names: set[str], machine: Machine, log: Log, running: Any) -> type:
    """Make a node of a trace. Its cost has `seconds`, and one of three more.

    mb: of a fresh output. models: it makes models of these MB. passes: it hands on clones of the models that come in by
    these names, with patches of mb.
    """
    import comfy.model_patcher
    import torch

    def tensor(mb: float) -> Any:
        made = torch.empty(max(1, int(mb * MIB)), dtype=torch.uint8)
        machine.hold(made, made.numel())
        return made

    def model(mb: float) -> Any:
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.empty(int(mb * MIB), dtype=torch.uint8), requires_grad=False)
        machine.hold(module, int(mb * MIB))
        cpu = torch.device("cpu")
        return comfy.model_patcher.ModelPatcher(module, cpu, cpu)

    class Node:
        RETURN_TYPES = ("*",) * 4
        FUNCTION = "run"
        OUTPUT_NODE = bool(cost.get("output"))

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {name: ("*", {}) for name in sorted(names)}}

        def run(self, **inputs: Any) -> Any:
            machine.now += cost["seconds"]
            log.ran(kind, identity(running.graph, running.node), cost["seconds"])
            if "models" in cost:
                return tuple(model(mb) for mb in cost["models"])
            if "passes" in cost:
                shared, clones = tensor(cost["mb"]), []
                for name in cost["passes"]:
                    clone = inputs[name].clone()
                    clone.patches = {"lora": [(1.0, shared)]}
                    clones.append(clone)
                return tuple(clones)
            return (tensor(cost.get("mb", 0.001)),)

    return Node


def replay(
    trace: dict[str, Any], cache_type: str, cache_args: dict[str, float], *, ours: bool = False
) -> dict[str, Any]:
    """Run all prompts; return figures. cache_type, cache_args: as for the executor; ours: its cache is Spillway's."""
    import execution
    import nodes

    machine, log = Machine(int(trace["ram_gb"] * GIB)), Log()
    names: dict[str, set[str]] = {}
    for prompt in trace["prompts"]:
        for node in prompt.values():
            names.setdefault(node["class_type"], set()).update(node["inputs"])
    running = types.SimpleNamespace(graph={}, node="")
    classes = {
        kind: node_class(kind, trace["costs"][kind], used, machine, log, running) for kind, used in names.items()
    }
    own_execute = execution.execute

    async def execute(server: Any, dynprompt: Any, caches: Any, current: str, *rest: Any) -> Any:
        running.node = current
        machine.settle()
        return await own_execute(server, dynprompt, caches, current, *rest)

    before = dict(nodes.NODE_CLASS_MAPPINGS)
    nodes.NODE_CLASS_MAPPINGS.update(classes)
    virtual_memory, psutil.virtual_memory = psutil.virtual_memory, machine.virtual_memory
    execution.execute = execute
    gc.collect()
    gc.freeze()  # else each collection looks at all of ComfyUI's own objects, which live on anyway
    if ours:
        use_ours(machine, cache_args)
    try:
        executor = execution.PromptExecutor(
            Server(), cache_type=getattr(execution.CacheType, cache_type), cache_args={"lru": 0, **cache_args}
        )
        for number, prompt in enumerate(trace["prompts"]):
            running.graph = prompt
            outputs = [node for node, what in prompt.items() if trace["costs"][what["class_type"]].get("output")]
            asyncio.run(executor.execute_async(prompt, str(number), {}, outputs))
            if not executor.success:
                raise SystemExit(f"{trace['about']}: prompt {number} failed: {executor.status_messages[-1]}")
            gc.collect()
            machine.settle()
        entries = len(executor.caches.outputs.cache)
    finally:
        gc.unfreeze()
        psutil.virtual_memory = virtual_memory
        execution.execute = own_execute
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(before)
    return {
        "seconds": log.seconds,
        "again_s": log.again,
        "made_again": dict(log.made_again),
        "peak_gb": machine.peak / GIB,
        "kept_gb": machine.settled / GIB,
        "entries": entries,
    }


def use_ours(machine: Machine, cache_args: dict[str, float]) -> None:
    """Put our cache in the executor's place, on the simulated clock and memory."""
    from spillway.cache import output_cache
    from spillway.cache.comfyui import cache as comfy_cache
    from spillway.cache.comfyui import install
    from spillway.ops.ram.available import Available

    install.available_ram = lambda: Available(machine.available, machine.ram, "the trace")
    install.given_headrooms = lambda: [cache_args["ram"]]
    comfy_cache.time = types.SimpleNamespace(perf_counter=lambda: machine.now, monotonic=lambda: machine.now)
    output_cache.allocator.trim = lambda: False
