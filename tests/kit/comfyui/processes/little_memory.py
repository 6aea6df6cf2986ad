"""Run a model in ComfyUI's executor, after images that the output cache keeps, in a process with little memory.

little_memory.py COMFYUI PACK BASE FILE IMAGES MIB STEPS

Prints JSON: a digest of the latent, what the cache evicted, the peak of private memory and what was decided.
"""

import asyncio
import hashlib
import json
import logging
import runpy
import sys
import threading
import time

comfyui, pack, base, file, images, mib, steps = sys.argv[1:]
sys.path[:0] = [comfyui, f"{pack}/tests"]
runpy.run_path(f"{pack}/prestartup_script.py")

import comfy.cli_args

comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = base

import execution
import nodes
import torch

import kit.pack  # noqa: F401 - makes the package `spillway`
from kit.comfyui import sampling
from spillway.cache.comfyui import install
from spillway.nodes.load import SpillwayLoadDiffusionModel
from spillway.ops.ram.available import available_ram, process_bytes

torch.set_num_threads(2)
peak, log = [0], []
handler = logging.Handler()
handler.emit = lambda record: log.append(record.getMessage())
logging.getLogger("spillway").addHandler(handler)
logging.getLogger("spillway").setLevel(logging.INFO)


def watch():
    while True:
        peak[0] = max(peak[0], process_bytes())
        time.sleep(0.01)


class Server:
    client_id = None
    last_node_id = None

    def send_sync(self, *_):
        pass


def node_class(make, output, **inputs):
    class Node:
        RETURN_TYPES = ("*", "*")
        FUNCTION = "run"
        OUTPUT_NODE = output
        INPUT_TYPES = classmethod(lambda cls: {"optional": {name: (kind, {}) for name, kind in inputs.items()}})

        def run(self, **given):
            return make(**given)

    return Node


def digest(latent):
    data = latent["samples"].contiguous().view(torch.uint8).numpy().tobytes()
    return {"ui": {"digest": [hashlib.sha256(data).hexdigest()]}, "result": (None, None)}


nodes.NODE_CLASS_MAPPINGS |= {
    "Conds": node_class(lambda model: sampling.conds(model), False, model="MODEL"),
    "Image": node_class(lambda number: (torch.full((mib_of(), 512, 512), number / 7), None), False, number="INT"),
    "Look": node_class(lambda image: {"ui": {}, "result": (None, None)}, True, image="*"),
    "Digest": node_class(digest, True, latent="LATENT"),
    "Load": SpillwayLoadDiffusionModel,
}
SpillwayLoadDiffusionModel.GET_SCHEMA()


def mib_of():
    return int(mib)  # 512 x 512 numbers of float32 are a MiB


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def image_prompt(number):
    return {"image": node("Image", number=number), "look": node("Look", image=["image", 0])}


MODEL = {
    "load": node("Load", unet_name=file, weight_dtype="default"),
    "conds": node("Conds", model=["load", 0]),
    "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
    "sample": node(
        "KSampler",
        model=["load", 0],
        positive=["conds", 0],
        negative=["conds", 1],
        latent_image=["latent", 0],
        seed=1,
        steps=int(steps),
        cfg=1.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    ),
    "digest": node("Digest", latent=["sample", 0]),
}


def run(executor, prompt, number, output):
    asyncio.run(executor.execute_async(prompt, str(number), {"client_id": "me"}, [output]))
    if not executor.success:
        kind, said = executor.status_messages[-1]
        raise SystemExit(f"{kind}: {said.get('exception_type')}: {said.get('exception_message')}")
    return executor


threading.Thread(target=watch, daemon=True).start()
asyncio.run(nodes.init_builtin_extra_nodes())
assert install.install()
executor = execution.PromptExecutor(
    Server(), execution.CacheType.RAM_PRESSURE, {"lru": 0, "ram": 2.0, "ram_inactive": 64.0}
)
begun = available_ram()
for number in range(int(images)):
    run(executor, image_prompt(number), number, "look")
engine = executor.caches.outputs.engine
held, before_model = engine.ram_bytes(), time.perf_counter()
run(executor, MODEL, "model", "digest")
print(
    json.dumps(
        {
            "digest": executor.history_result["outputs"]["digest"]["digest"][0],
            "held": held,
            "evicted": engine.evicted,
            "peak": peak[0],
            "seconds": time.perf_counter() - before_model,
            "begun": [begun.available, begun.total, begun.reason],
            "log": log,
        }
    )
)
