"""Start a ComfyUI in a base folder of its own, talk to it over HTTP, stop it again. Nothing of it is imported here."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

START_SECONDS = 300  # the first start of an installation compiles and may look at many files
HAS_GPU = (
    "import torch; b = getattr(torch.backends, 'mps', None); x = getattr(torch, 'xpu', None); "
    "print(int(torch.cuda.is_available() or bool(x and x.is_available()) or bool(b and b.is_available())))"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# What a copy of the pack leaves behind where links are not allowed.
NOT_THE_PACK = shutil.ignore_patterns(".git", ".venv", ".host-tools", "__pycache__", "benchmarks", "tests")


class ServerError(RuntimeError):
    """ComfyUI did not start, refused the graph, or failed while running it."""


def has_gpu(python: str) -> bool:
    """Say whether the torch of that Python sees a device other than the CPU."""
    answer = subprocess.run([python, "-c", HAS_GPU], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == "1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def install(pack: Path, custom_nodes: Path) -> None:
    """Put the pack into a custom_nodes folder: as a link, or as a copy where the system allows no links."""
    custom_nodes.mkdir(parents=True, exist_ok=True)
    target = custom_nodes / "spillway"
    try:
        target.symlink_to(pack, target_is_directory=True)
    except OSError:
        shutil.copytree(pack, target, ignore=NOT_THE_PACK)


class Server:
    """A running ComfyUI whose models come from ``models`` and whose everything else lies under ``base``.

    The base folder keeps the user's own installation out of it: its custom nodes, its settings, its output.
    """

    def __init__(self, comfyui: Path, python: str, base: Path, pack: Path, models: Path) -> None:
        install(pack, base / "custom_nodes")
        paths = base / "extra_model_paths.yaml"
        # JSON is YAML too, and quotes a path as it should be.
        kinds = ("diffusion_models", "text_encoders", "vae")
        paths.write_text(json.dumps({"demo": {kind: str(models.resolve()) for kind in kinds}}), encoding="utf-8")
        self.log_path = base / "server.log"
        self.port = _free_port()
        command = [python, "main.py", "--port", str(self.port), "--disable-auto-launch"]
        command += ["--base-directory", str(base), "--extra-model-paths-config", str(paths)]
        for kind in ("output", "input", "temp", "user"):
            (base / kind).mkdir(exist_ok=True)
            command += [f"--{kind}-directory", str(base / kind)]
        # Its default is a file inside the installation, whatever the base directory.
        command += ["--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}"]
        if not has_gpu(python):
            command.append("--cpu")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=comfyui, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        """Return everything that the server has printed, without its colours."""
        return COLOURS.sub("", self.log_path.read_text(encoding="utf-8", errors="replace"))

    def _fetch(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        # A user's proxy cannot reach this machine's own server.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return answer.read()

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of the log, for an error message."""
        return "\n".join(self.log().splitlines()[-lines:])

    def check_alive(self) -> None:
        """Raise ServerError with the end of the log if the process has ended."""
        if self.process.poll() is not None:
            status = self.process.returncode
            raise ServerError(f"ComfyUI ended with status {status}; the end of its log:\n{self.log_tail()}")

    def started(self) -> bool:
        """Say whether it answers yet."""
        self.check_alive()
        try:
            self._fetch("/system_stats")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def wait_until_started(self, note: Callable[[float], None]) -> None:
        """Return once it answers; ``note(seconds)`` is called while waiting."""
        begun = time.monotonic()
        while not self.started():
            waited = time.monotonic() - begun
            if waited > START_SECONDS:
                raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.log_tail()}")
            note(waited)
            time.sleep(0.3)

    def node_types(self) -> set[str]:
        """Return the ids of the nodes it has."""
        return set(json.loads(self._fetch("/object_info")))

    def queue(self, graph: dict) -> str:
        """Queue an API-format graph; return the prompt's id."""
        try:
            return json.loads(self._fetch("/prompt", {"prompt": graph}))["prompt_id"]
        except urllib.error.HTTPError as error:
            raise ServerError(f"ComfyUI refused the graph: {error.read().decode(errors='replace')}") from None

    def result(self, prompt: str) -> dict | None:
        """Return the history entry of a prompt; None while it waits or runs. Raise ServerError if it failed."""
        self.check_alive()
        entry = json.loads(self._fetch(f"/history/{prompt}")).get(prompt)
        if entry is not None and entry["status"]["status_str"] != "success":
            messages = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
            reason = messages[0] if messages else entry["status"]
            where, what = reason.get("node_type", "?"), reason.get("exception_message", reason)
            trace = "".join(reason.get("traceback", [])[-3:])
            raise ServerError(f"the graph failed in {where}: {what}\n{trace}")
        return entry

    def view(self, image: dict) -> bytes:
        """Download an image that a result names."""
        keys = ("filename", "subfolder", "type")
        return self._fetch("/view?" + urllib.parse.urlencode({key: image[key] for key in keys}))
