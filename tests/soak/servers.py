"""Two servers on one user and one output folder, which are ended and started again."""

import json
import time

from kit.comfyui.running_server import Server

from .invariants import Faults, Resources, faults_in_log, leftovers

SETTINGS = {"Spillway.Cache.DiskGB": 1, "Spillway.Cache.DiskSeconds": 0}  # every evicted output is written
ARGUMENTS = ["--disable-api-nodes"]  # they reach out, and cost a second of each start
# Results are compared bit for bit. One thread, as several servers share the machine's cores.
VARIABLES = {"MKL_CBWR": "AUTO", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class WatchedServer(Server):
    """Notes each answer that says that the server itself failed."""

    def __init__(self, base, arguments=(), log="server.log", faults=None, **variables):
        super().__init__(base, [*ARGUMENTS, *arguments], log, **VARIABLES, **variables)
        self.faults = faults or Faults()
        self.is_capped = "SPILLWAY_RAM_GB" in variables
        self.resources = Resources(self.process)
        self.killed = False

    def ask(self, path, data=None, *arguments, **named):
        status, answer = super().ask(path, data, *arguments, **named)
        if status >= 500:
            self.faults.add("status", f"{status} for {path} with {str(data)[:300]}: {answer[:300]}")
        return status, answer

    def post(self, path, body):
        """(status, JSON or text) of a POST with a JSON body."""
        status, answer = self.ask(path, json.dumps(body).encode())
        try:
            return status, json.loads(answer or b"null")
        except ValueError:
            return status, answer.decode(errors="replace")

    def sample(self):
        """Look at its resources when all is freed, also what ComfyUI frees in its own time."""
        self.post("free", {"unload_models": True, "free_memory": True})
        self.post("spillway/free", {"cache": True, "models": True, "pins": True})
        time.sleep(1)
        print(f"{self.port}: {self.resources.sample()}", flush=True)

    def kill(self):
        self.killed = True
        super().kill()

    @property
    def is_up(self):
        return self.process.poll() is None


class Pair:
    """base: the folder of both. What is left over after each of two starts in a row was never swept."""

    def __init__(self, base, faults):
        self.base, self.faults = base, faults
        self.servers, self.starts = [None, None], 0
        self.left, self.said = set(), set()
        settings = base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(SETTINGS))

    def start(self, *places, **variables):
        """Start servers in these places, at once, and look at what earlier ones left."""
        before = leftovers(self.base)
        for place in places:
            self.starts += 1
            log = f"server-{self.starts}.log"
            self.servers[place] = WatchedServer(self.base, (), log, self.faults, **variables)
        for place in places:
            server = self.servers[place]
            server.wait(lambda server=server: server.get("system_stats"), 300)
            server.get("object_info/SpillwayPolicy")["SpillwayPolicy"]
        # Only what was there before: what a server that goes on writes is none of these.
        left = leftovers(self.base) & before
        for name in sorted(left & self.left - self.said):
            self.faults.add("left over after two starts", name)
        self.said |= left & self.left
        self.left = left

    def kill(self, *places):
        for place in places:
            server = self.servers[place]
            server.kill()
            self.ended(server)

    def ended(self, server):
        for line in faults_in_log(server.said()):
            self.faults.add("log", line)
        trend = server.resources.trend()
        if trend:
            self.faults.add("not flat", trend)

    def close(self):
        for server in self.servers:
            if server is not None and not server.killed:
                server.stop()
                self.ended(server)
        self.servers = [None, None]
