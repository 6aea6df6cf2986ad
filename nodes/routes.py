"""Serves GET /spillway/memory and /compare and POST /spillway/free, /model, /look, /forecast and /compare.

ComfyUI's own middleware stands before them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.parse
from typing import Any, NamedTuple

import comfy.model_management
import torch
from aiohttp import web

from ..cache.comfyui.install import current_cache
from ..ops.never_raises import never_raises
from ..ops.ram.garbage import collect_garbage
from ..patcher.comfyui.running import free_models, free_pins
from . import compare, forecast_report, model_actions
from .between_prompts import held_off
from .memory_report import memory_report, take_snapshot
from .shared_report import SharedReport
from .watchers import Watchers

MAX_BODY_BYTES = 4096
PART_SECONDS = 10  # in which more of a body has to come
PARTS = ("cache", "models", "pins")
USAGE = (
    'a JSON object: any of "cache", "models" and "pins" as true, and "bytes", a whole number, for how much of the '
    "cache should go"
)


LOOK_USAGE = 'a JSON object: "client_id" of an open websocket, and "looks" as true or false'
MOST_ID = 100  # characters
FORECAST_USAGE = 'a JSON object: "prompt", a workflow in API format'
COMPARE_USAGE = (
    'a JSON object: "prompt", a workflow in API format, and, as one likes, "comfyui", the same with ComfyUI\'s '
    'loaders, and "client_id"'
)
MAX_PROMPT_BYTES = 2 << 20
MOST_NODES = 5000


class BadRequest(ValueError):
    """Says what the caller did wrong. status: of the answer."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.status = status


def install() -> bool:
    """Add the routes to the running server. Returns False where there is none, as in tests and scripts."""
    server = sys.modules.get("server")  # importing it here would begin to make a server
    running = getattr(getattr(server, "PromptServer", None), "instance", None)
    if running is None:
        return False

    report = SharedReport(lambda: memory_report())
    foreseeing = asyncio.Lock()
    watchers = Watchers(report, lambda client: running.sockets.get(client))

    @running.routes.get("/spillway/memory")
    @never_raises("GET /spillway/memory", failed)
    async def get_memory(request: web.Request) -> web.Response:
        return web.Response(body=await report.get(), content_type="application/json", charset="utf-8")

    @running.routes.post("/spillway/free")
    @never_raises("POST /spillway/free", failed)
    async def post_free(request: web.Request) -> web.Response:
        try:
            wanted = parse(await json_object(request))
        except BadRequest as error:
            return refusal(error, USAGE)
        done = await asyncio.get_running_loop().run_in_executor(None, free, running.prompt_queue, wanted)
        return web.json_response(done)

    @running.routes.post("/spillway/model")
    @never_raises("POST /spillway/model", failed)
    async def post_model(request: web.Request) -> web.Response:
        try:
            action = model_actions.Action.read(await json_object(request))
        except ValueError as error:
            return refusal(error, model_actions.USAGE)
        loop = asyncio.get_running_loop()
        done = await loop.run_in_executor(None, model_actions.act, running.prompt_queue, action)
        if done is None:
            return web.json_response({"error": f"there is no model {action.model} any more."}, status=404)
        return web.json_response(done)

    @running.routes.post("/spillway/look")
    @never_raises("POST /spillway/look", failed)
    async def post_look(request: web.Request) -> web.Response:
        try:
            client, looks = parse_look(await json_object(request))
            if looks and client not in running.sockets:
                raise BadRequest("no websocket of this client is open.")
            if looks and not watchers.look(client):
                raise BadRequest("too many pages look already.", status=429)
            if not looks:
                watchers.leave(client)
        except BadRequest as error:
            return refusal(error, LOOK_USAGE)
        return web.json_response({"looking": watchers.count})

    @running.routes.post("/spillway/forecast")
    @never_raises("POST /spillway/forecast", failed)
    async def post_forecast(request: web.Request) -> web.Response:
        try:
            prompt = parse_prompt(await json_object(request, MAX_PROMPT_BYTES))
        except BadRequest as error:
            return refusal(error, FORECAST_USAGE)
        if foreseeing.locked():
            busy = BadRequest("another forecast is being made.", status=429)
            return refusal(busy, "to be asked again in a moment")
        async with foreseeing:
            told = await asyncio.get_running_loop().run_in_executor(None, foreseen, prompt)
        return web.json_response(told)

    @running.routes.get("/spillway/compare")
    @never_raises("GET /spillway/compare", failed)
    async def get_compare(request: web.Request) -> web.Response:
        comparison = compare.current()
        if comparison is None:
            return web.json_response({"state": "none"})
        compare.look(comparison)
        return web.json_response(comparison.as_dict())

    @running.routes.post("/spillway/compare")
    @never_raises("POST /spillway/compare", failed)
    async def post_compare(request: web.Request) -> web.Response:
        try:
            asked = parse_compare(await json_object(request, 2 * MAX_PROMPT_BYTES))
            last = compare.current()
            if last is not None:
                compare.look(last)
                if last.state == "runs":
                    raise BadRequest("another comparison is under way.", status=429)
            stays = compare.ours_in(asked.prompts[compare.KINDS[0]])
            comparison = compare.Comparison(running.prompt_queue, stays)
            queued = compare.prompts(comparison, asked.prompts, asked.client)
            outputs = []
            for number, prompt, _ in queued:
                valid = await sys.modules["execution"].validate_prompt(number, prompt, None)
                if not valid[0] or valid[3]:  # ComfyUI would run what is left, which may be another part in each run
                    raise BadRequest(f"this workflow cannot run: {invalid(valid)}.")
                outputs.append(valid[2])
            if compare.current() is not last:  # while that waited
                raise BadRequest("another comparison is under way.", status=429)
        except BadRequest as error:
            return refusal(error, COMPARE_USAGE)
        compare.begin(comparison)
        for (number, prompt, extra_data), wanted in zip(queued, outputs, strict=True):
            created = {**extra_data, "create_time": int(time.time() * 1000)}
            running.prompt_queue.put((running.number, number, prompt, created, wanted, {}))
            running.number += 1
        return web.json_response(comparison.as_dict())

    return True


def foreseen(prompt: dict[str, Any]) -> dict[str, Any]:
    """Make a forecast as in a prompt, where ComfyUI loads models."""
    with torch.inference_mode():
        return forecast_report.forecast(prompt)


def refusal(error: ValueError, usage: str) -> web.Response:
    """Say what the caller did wrong."""
    return web.json_response({"error": f"{error} Expected {usage}."}, status=getattr(error, "status", 400))


async def json_object(request: web.Request, most: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """Read the JSON object, of at most so many bytes, that a page of this server sent. Raises BadRequest."""
    if not is_same_origin(request):
        raise BadRequest("only pages of this server may do that.", status=403)
    return read_object(request.content_type, await body_of(request, most), most)


async def body_of(request: web.Request, most: int = MAX_BODY_BYTES) -> bytes:
    """Read a body, and no more of it than one may have. Raises BadRequest where it is not what its headers say."""
    try:
        found = bytearray()
        while len(found) <= most:
            part = await asyncio.wait_for(request.content.read(most + 1 - len(found)), PART_SECONDS)
            if not part:
                break
            found += part
        return bytes(found)
    except asyncio.TimeoutError:  # aiohttp waits for ever for the rest of a body that it could not inflate
        raise BadRequest(f"nothing more of the body came for {PART_SECONDS} s.", status=408) from None
    except web.RequestPayloadError:
        raise BadRequest("the body is not encoded as its Content-Encoding says, or ends too soon.") from None
    except ConnectionError:  # nothing of ours failed, and nobody reads the answer
        raise BadRequest("the connection ended before the body did.") from None


def failed(_: web.Request) -> web.Response:
    """Answer where something of ours failed."""
    return web.json_response({"error": "this failed; the server's log says why."}, status=500)


def is_same_origin(request: web.Request) -> bool:
    """Refuse pages of other sites, which browsers name in each request. Programs name none, and may."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("Origin")
    if origin is None:
        return True
    try:
        return urllib.parse.urlsplit(origin).netloc.lower() == request.headers.get("Host", "").lower()
    except ValueError:  # no address at all
        return False


def read_object(content_type: str, body: bytes, most: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises BadRequest."""
    if content_type != "application/json":
        raise BadRequest(f"the content type is {content_type!r}, not application/json.")
    if len(body) > most:
        raise BadRequest(f"the body is larger than {most} bytes.")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequest("the body is no JSON.") from None
    if not isinstance(found, dict):
        raise BadRequest("the body is no JSON object.")
    return found


def parse_look(asked: dict[str, Any]) -> tuple[str, bool]:
    """Read (client id, whether it looks) from a request. Raises BadRequest."""
    client, looks = asked.get("client_id"), asked.get("looks")
    if not isinstance(client, str) or not 0 < len(client) <= MOST_ID:
        raise BadRequest('"client_id" is no id.')
    if not isinstance(looks, bool):
        raise BadRequest('"looks" is neither true nor false.')
    return client, looks


def parse_prompt(asked: dict[str, Any]) -> dict[str, Any]:
    """Read a workflow in API format. Raises BadRequest."""
    unknown = sorted(set(asked) - {"prompt"})
    if unknown:
        raise BadRequest(f"there is no {', '.join(unknown)[:100]} to give.")
    prompt = asked.get("prompt")
    if not isinstance(prompt, dict) or len(prompt) > MOST_NODES:
        raise BadRequest(f'"prompt" is no object of at most {MOST_NODES} nodes.')
    for name, node in prompt.items():
        is_node = isinstance(node, dict) and isinstance(node.get("class_type"), str)
        if not is_node or not isinstance(node.get("inputs"), dict):
            raise BadRequest(f'node "{name[:MOST_ID]}" has no "class_type" and "inputs".')
    return prompt


class Asked(NamedTuple):
    """What is to be compared. prompts: by whose loaders it is to be run through."""

    prompts: dict[str, dict[str, Any]]
    client: str | None


def parse_compare(asked: dict[str, Any]) -> Asked:
    """Read what is to be compared. Raises BadRequest."""
    client = asked.get("client_id")
    if client is not None and (not isinstance(client, str) or not 0 < len(client) <= MOST_ID):
        raise BadRequest('"client_id" is no id.')
    rest = {name: value for name, value in asked.items() if name not in ("client_id", "comfyui")}
    ours = parse_prompt(rest)
    theirs = parse_prompt({"prompt": asked["comfyui"]}) if "comfyui" in asked else ours
    return Asked(dict(zip(compare.KINDS, (theirs, ours), strict=True)), client)


def invalid(valid: Any) -> str:
    """Say why ComfyUI refuses a prompt."""
    errors = [error for node in (valid[3] or {}).values() for error in node.get("errors", ())]
    found = errors[0] if errors else valid[1]
    return f"{found.get('message', '')} {found.get('details', '')}".strip()[:300]


def parse(wanted: dict[str, Any]) -> dict[str, Any]:
    """Check what is to be freed. Raises BadRequest."""
    unknown = sorted(set(wanted) - {*PARTS, "bytes"})
    if unknown:
        raise BadRequest(f"there is no {', '.join(unknown)[:100]} to free.")
    for part in PARTS:
        if not isinstance(wanted.get(part, False), bool):
            raise BadRequest(f'"{part}" is neither true nor false.')
    nbytes = wanted.get("bytes")
    if nbytes is not None and (isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 <= nbytes < 1 << 62):
        raise BadRequest('"bytes" is no whole number of bytes.')
    if not any(wanted.get(part) for part in PARTS):
        raise BadRequest("nothing is to be freed.")
    return wanted


def free(queue: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    """Free all that is not in use. While a prompt runs, its models are freed when it ends.

    Returns the bytes freed from the cache, the bytes of them that are still to be written to disk, the parts that were
    put off, and the difference in words.
    """
    before = take_snapshot()
    put_off = []
    cache = current_cache()
    taken = None
    # Else a prompt could begin meanwhile, and its models would be freed under it. What may go on beside one is last.
    with held_off(queue) as running:
        if wanted.get("models"):
            if running:
                queue.set_flag("unload_models", True)
                put_off.append("models")
            else:
                free_models()
        if wanted.get("pins"):
            if running:
                put_off.append("pins: ask again when the prompt has ended")
            else:
                free_pins()
        if wanted.get("cache") and cache is not None:
            short = wanted.get("bytes", 1 << 62)
            taken = cache.engine.take(short, current=not running, reason="asked for by /spillway/free")
    freed = cache.engine.let_go(taken).freed if cache is not None and taken is not None else 0
    if not running:
        if wanted.get("models"):
            # What a model that nobody wants any more is made of refers to itself. ComfyUI's own collection after a
            # prompt may have passed by while all models were held here, and the next is at the end of another prompt.
            collect_garbage()
        comfy.model_management.soft_empty_cache()
    after = take_snapshot()
    return {
        "cache_bytes": freed,
        "writing_bytes": cache.engine.writer.nbytes if cache is not None else 0,
        "put_off": put_off,
        "words": before.difference(after),
        "memory": after.as_dict(),
    }
