"""The disturbances. Each takes the round while prompts run, and says how many of its kind it made."""

import json
import socket
import struct
import time

from .files import WAYS, WHILE_UP
from .fuzz import request
from .jobs import Job


def interrupt(around):
    server = around.any_server()
    time.sleep(around.rng.random())
    server.post("interrupt", {})


def free_by_comfyui(around):
    body = {"unload_models": around.maybe(0.7), "free_memory": around.maybe(0.7)}
    for _ in range(around.rng.randint(1, 3)):
        around.any_server().post("free", body)
        time.sleep(around.rng.random() / 2)


def free_by_us(around):
    for _ in range(around.rng.randint(1, 3)):
        body = {part: True for part in ("cache", "models", "pins") if around.maybe(0.6)} or {"cache": True}
        if around.maybe(0.3):
            body["bytes"] = around.rng.choice((0, 1, 1 << 20))
        status, answer = around.any_server().post("spillway/free", body)
        if status != 200:
            around.faults.add("free refused", f"{status} {answer} for {body}")
        time.sleep(around.rng.random() / 2)


def buttons(around):
    """Press buttons of the panel, on models of the report or on one that is gone."""
    server = around.any_server()
    _, text = server.ask("spillway/memory")
    alive = [record["id"] for record in json.loads(text)["models"] if "id" in record]
    for _ in range(around.rng.randint(1, 4)):
        action = around.rng.choice(("free_vram", "drop_ram", "keep", "limit"))
        value = {"keep": around.maybe(0.5), "limit": around.rng.choice((None, None, 0, 1 << 20, 1 << 34))}.get(action)
        number = around.rng.choice([*alive, 0])
        body = {"model": number, "action": action, "value": value}
        status, answer = server.post("spillway/model", body)
        if status not in (200, 404):
            around.faults.add("button refused", f"{status} {answer} for {body}")
        time.sleep(around.rng.random() / 3)
    for number in alive:  # as the nodes say again
        server.post("spillway/model", {"model": number, "action": "keep", "value": False})
        server.post("spillway/model", {"model": number, "action": "limit", "value": None})


def reports(around):
    for _ in range(5):
        around.any_server().ask("spillway/memory")


def disconnect(around):
    """A client sends a prompt over its websocket's name and goes; others go in the middle of what they send or get."""
    server = around.any_server()
    with _socket(server) as client:
        client.sendall(
            b"GET /ws?clientId=goes HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        client.recv(100)
        around.send(server, client="goes")
        time.sleep(around.rng.random() / 2)
        _reset(client)
    body = json.dumps({"prompt": around.graph(server)}).encode()
    for path, data in (("spillway/free", b'{"cache": true}'), ("prompt", body)):
        with _socket(server) as client:
            head = f"POST /{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2])
            _reset(client)
    with _socket(server) as client:
        client.sendall(b"GET /spillway/memory HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        _reset(client)


def _socket(server):
    return socket.create_connection(("127.0.0.1", server.port), 60)


def _reset(client):
    """Close so that the server gets an error and no end."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def clear_queue(around):
    for server in around.pair.servers:
        around.send(server)
    around.any_server().post("queue", {"clear": True})
    around.queue_cleared = True


def both_save(around):
    """Both servers save under one prefix at once."""
    for server in around.pair.servers:
        around.send(server, save=True)


def replace_files(around):
    """Between prompts: the next ones must be of the new files."""
    around.finish_all()
    for name in around.rng.sample(WHILE_UP, 2):
        around.replace(name, around.rng.choice(WAYS))
    for server in around.pair.servers:
        around.send(server)


def kill_one(around):
    place = around.rng.randrange(2)
    time.sleep(around.rng.random() * 2)
    around.pair.kill(place)
    around.check_files()
    around.pair.start(place)


def kill_and_cap(around):
    """As where a container is started again with less memory: evictions at every node."""
    place = around.rng.randrange(2)
    time.sleep(around.rng.random())
    around.pair.kill(place)
    around.check_files()
    around.pair.start(place, SPILLWAY_RAM_GB=around.rng.choice(("0.001", "0.9", "1.1")))


def wrong_prompts(around):
    server = around.any_server()
    made = [around.fuzz.prompt() for _ in range(10)]
    jobs = [(Job(server, prompt, around.files, around.faults), given) for prompt, _, given in made]
    for job, given in jobs:
        outcome = job.finish(may_fail=True, given=given)
        around.count(f"fuzzed: {outcome}")


def free_all(around):
    """When nothing runs: then the servers' resources must be what they were."""
    around.finish_all()
    for server in around.pair.servers:
        server.sample()


def wrong_requests(around):
    for _ in range(20):
        path, body, method, headers = request(around.rng)
        try:
            around.any_server().ask(path, body, method, **headers)
        except (OSError, ValueError):  # what urllib or aiohttp does not let through
            around.count("requests not let through")


# The dearest first. Each comes up once before any comes up twice.
DISTURBANCES = {
    "kill": kill_one,
    "kill, less RAM": kill_and_cap,
    "files replaced": replace_files,
    "both save": both_save,
    "interrupt": interrupt,
    "free by ComfyUI": free_by_comfyui,
    "free by us": free_by_us,
    "buttons": buttons,
    "reports": reports,
    "disconnect": disconnect,
    "queue cleared": clear_queue,
    "wrong prompts": wrong_prompts,
    "wrong requests": wrong_requests,
    "all freed": free_all,
}
RARE = ("kill", "kill, less RAM")  # a start takes as long as twenty prompts
