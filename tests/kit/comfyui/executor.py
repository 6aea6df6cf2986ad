"""Run graphs of small nodes in ComfyUI's own executor, with a limit on memory."""

import asyncio
import types

import comfy.model_patcher
import execution
import torch

from spillway.cache.comfyui import store
from spillway.cache.comfyui.first_seen import first_seen
from spillway.ops.ram.available import Available

MIB = 1 << 20
RAN = []
ALL = ["Load", "Lora", "Encode", "Sample", "Decode", "Save"]


class Server:
    client_id = None
    last_node_id = None

    def send_sync(self, *_):
        pass


def node_class(name, make, output=False, seconds=0.0, changed=None):
    class Node:
        RETURN_TYPES = ("IMAGE", "*")
        FUNCTION = "run"
        OUTPUT_NODE = output

        @classmethod
        def INPUT_TYPES(cls):
            return {"optional": {key: ("*", {}) for key in ("a", "b", "value")}}

        def run(self, **inputs):
            RAN.append((name, inputs.get("value")))
            return make(**inputs)

    if changed is not None:
        Node.IS_CHANGED = classmethod(lambda cls, **_: changed())
    return Node


def patcher(mib):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(mib * MIB, dtype=torch.uint8), requires_grad=False)
    return comfy.model_patcher.ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))


def tensor(mib):
    return torch.zeros(int(mib * MIB), dtype=torch.uint8)


class Sour(dict):
    def values(self):
        raise RuntimeError("not to be measured")


def strange():
    """Make an output that ComfyUI cannot look into: it knows containers, but no objects."""
    found = types.SimpleNamespace(sour=Sour(x=1), images=tensor(1))
    found.itself, found.loop = found, [found]
    return found


NODES = {
    "Load": node_class("Load", lambda value=0, **_: (patcher(40), "clip")),
    "Lora": node_class("Lora", lambda a=None, **_: (a.clone(), None)),
    "Encode": node_class("Encode", lambda **_: ([[tensor(1), {"pooled": tensor(1)}]], None)),
    "Sample": node_class("Sample", lambda **_: ({"samples": tensor(2)}, None)),
    "Decode": node_class("Decode", lambda **_: (tensor(10), None)),
    "Save": node_class("Save", lambda value="", **_: {"ui": {"text": [f"saved {value}"]}, "result": (None,)}, True),
    "Random": node_class("Random", lambda **_: (tensor(1), None), changed=lambda: float("nan")),
    "Strange": node_class("Strange", lambda **_: (strange(), object())),
}


def prompt(seed=1, text="a"):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "load": node("Load", value="model"),
        "lora": node("Lora", a=["load", 0], value=1.0),
        "text": node("Encode", a=["load", 1], value=text),
        "sample": node("Sample", a=["lora", 0], b=["text", 0], value=seed),
        "image": node("Decode", a=["sample", 0]),
        "save": node("Save", a=["image", 0], value=seed),
    }


class Executor:
    def __init__(self, cache_type="RAM_PRESSURE"):
        store._last = None  # each stands for a machine of its own
        first_seen.__init__()
        cache_args = {"lru": 100, "ram": 2.0, "ram_inactive": 64.0}
        self.real = execution.PromptExecutor(Server(), getattr(execution.CacheType, cache_type), cache_args)
        self.cache = self.real.caches.outputs
        self.count = 0

    def limit(self, mib, headroom=10):
        engine, total = self.cache.engine, mib * MIB
        engine.headroom = self.cache.base_headroom = headroom * MIB

        def available():
            held = engine.ram_bytes() + engine.writer.nbytes
            return Available(max(0, total - held), total, "the test's memory")

        engine.available = available
        return engine

    def run(self, graph, output="save"):
        """Run a graph to its end and name the nodes that ran."""
        self.count += 1
        RAN.clear()
        asyncio.run(self.real.execute_async(graph, str(self.count), {"client_id": "me"}, [output]))
        assert self.real.success, self.real.status_messages
        return [name for name, _ in RAN]

    def kinds(self):
        return sorted(entry.kind for entry in self.cache.engine.entries.values())
