"""A ComfyUI server with the pack in its custom_nodes, in a process and a folder of its own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

from kit.device import is_real
from kit.find_comfyui import find_comfyui
from kit.pack import ROOT

ON_DEVICE = Path(__file__).parent / "processes" / "serve_on_fake_device.py"


class Server:
    """base: a folder for its models, settings and outputs. Several servers may share it, each with a log of its own.

    arguments: of ComfyUI's command line. on_device: of the fake device. Else it runs on the CPU, or as ComfyUI chooses
    where the device under test is a real one. variables: of its environment.
    """

    def __init__(self, base, arguments=(), log="server.log", on_device=False, **variables):
        self.base = base
        if not (base / "custom_nodes").exists():
            (base / "custom_nodes").mkdir()
            os.symlink(ROOT, base / "custom_nodes" / "ComfyUI-Spillway", target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = open(base / log, "w+b")  # noqa: SIM115 - open as long as the server
        script = str(ON_DEVICE) if on_device else "main.py"
        if is_real() and not on_device:
            where = os.environ.get("SPILLWAY_COMFYUI_OPTIONS", "").split()
        else:
            where = ["--disable-dynamic-vram" if on_device else "--cpu"]
        options = [
            *where,
            "--base-directory",
            str(base),
            "--port",
            str(self.port),
            "--disable-auto-launch",
        ]
        self.process = subprocess.Popen(
            [sys.executable, script, *options, "--database-url", "sqlite:///:memory:", *arguments],
            cwd=find_comfyui(),
            env={**os.environ, "PYTHONPATH": "", **variables},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def said(self):
        return Path(self.log.name).read_text(errors="replace")

    def get(self, path, body=None):
        """The JSON that the server answers. Raises HTTPError for a status that says no."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(self._request(path, data), timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def ask(self, path, data=None, method=None, seconds=120, **headers):
        """(status, body) of a request, whatever the status. Raises OSError where the server is away."""
        try:
            with urllib.request.urlopen(self._request(path, data, method, headers), timeout=seconds) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def _request(self, path, data, method=None, headers=()):
        sent = {"Content-Type": "application/json", **{name.replace("_", "-"): headers[name] for name in headers}}
        return urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", data, sent, method=method)

    def wait(self, what, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.said()
            try:
                found = what()
            except OSError:
                found = None
            if found:
                return found
            time.sleep(0.2)
        raise AssertionError(f"nothing after {seconds} s\n{self.said()}")

    def run(self, prompt, seconds=240):
        """Queue a prompt; returns its history when it has ended."""
        number = self.get("prompt", {"prompt": prompt})["prompt_id"]
        return self.wait(lambda: self.get(f"history/{number}").get(number), seconds)

    def pictures(self, prompt, seconds=240):
        """{node: picture} of a prompt that must succeed."""
        history = self.run(prompt, seconds)
        assert history["status"]["status_str"] == "success", json.dumps(history["status"], indent=1) + self.said()
        return self.pictures_of(history)

    def pictures_of(self, history):
        """{node: picture} of the history of a prompt."""
        return {
            node: np.asarray(Image.open(self.base / image["type"] / image["subfolder"] / image["filename"]))
            for node, output in history["outputs"].items()
            for image in output.get("images", [])
        }

    def __enter__(self):
        try:
            self.wait(lambda: self.get("system_stats"), 180)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    def kill(self):
        """End it as the kernel does when memory runs out: it can do nothing any more."""
        self.process.kill()
        self.process.wait()
        self.log.close()


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}
