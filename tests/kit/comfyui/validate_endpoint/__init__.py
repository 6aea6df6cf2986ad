"""A pack with the route that comfy-test asks: would ComfyUI take this prompt? Nothing of it is run.

comfy-test fetches ComfyUI-validate-endpoint from GitHub for that. This does the same for a machine that cannot.
"""

import uuid

import execution
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.post("/validate")
async def validate(request):
    prompt = (await request.json())["prompt"]
    valid, error, _, of_nodes = await execution.validate_prompt(str(uuid.uuid4()), prompt, None)
    told = {"valid": valid, "error": error, "node_errors": of_nodes}
    return web.json_response(told, status=200 if valid else 400)
