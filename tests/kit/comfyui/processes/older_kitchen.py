"""Start ComfyUI with a comfy-kitchen that is older than it wants, and load the pack's nodes. Print their count as JSON.

older_kitchen.py COMFYUI PACK BASE
"""

import asyncio
import json
import sys

comfyui, pack, base = sys.argv[1:]
sys.path[:0] = [comfyui, f"{pack}/tests"]

import comfy_kitchen.tensor

# What came last. ComfyUI goes on without any of its formats then.
for name in ("w4a8_int8", "AsymW4A8Int8Layout"):
    if hasattr(comfy_kitchen.tensor, name):
        delattr(comfy_kitchen.tensor, name)
sys.modules["comfy_kitchen.tensor.w4a8_int8"] = None

import comfy.cli_args

comfy.cli_args.args.cpu = True
comfy.cli_args.args.base_directory = base

import nodes  # noqa: F401 - ComfyUI's

import kit.pack  # noqa: F401 - makes the package `spillway`
from spillway.nodes.extension import SpillwayExtension
from spillway.patcher.comfyui.compile.products import traceable_products

with traceable_products():
    found = asyncio.run(SpillwayExtension().get_node_list())
print(json.dumps({"nodes": len(found)}))
