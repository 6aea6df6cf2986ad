"""Servers are killed while they save, write outputs to the disk tier, and sample, and started again."""

import collections
import contextlib
import json
import random
import shutil
import threading
import time

from kit.comfyui.running_server import node

from .compare import digests, key_of
from .files import Files
from .invariants import half_files, header_of, leftovers
from .jobs import Job, Stuck
from .mix import known_good
from .servers import Pair


def saving(dtype):
    """Takes about a second, most of it writing."""
    return {
        "load": node("SpillwayLoadDiffusionModel", unet_name="large.safetensors", weight_dtype="default"),
        "save": node("SpillwaySaveDiffusionModel", model=["load", 0], filename_prefix="ours/killed", dtype=dtype),
    }


def writing(seed):
    """Makes images of 200 MB, which the disk tier writes when they are evicted."""
    prompt = known_good("theirs", seed)
    prompt["vae"] = node("SpillwayLoadVAE", vae_name="ae.safetensors")
    prompt["image"] = node("VAEDecode", samples=["sampled", 0], vae=["vae", 0])
    sizes = {"upscale_method": "nearest-exact", "crop": "disabled"}
    prompt["large"] = node("ImageScale", image=["image", 0], width=4096, height=4096, **sizes)
    prompt["small"] = node("ImageScale", image=["large", 0], width=256, height=256, **sizes)
    prompt["saved"] = node("SaveImage", images=["small", 0], filename_prefix="theirs/small")
    return prompt


def sampling(seed):
    prompt = known_good("theirs", seed)
    prompt["load"]["inputs"]["unet_name"] = "large.safetensors"
    prompt["sampled"]["inputs"]["steps"] = 2
    return prompt


PROMPTS = {
    "saving": [saving("as loaded"), saving("fp32"), saving("fp8_e4m3fn scaled")],
    "writing": [writing(0), writing(1)],
    "sampling": [sampling(0), sampling(1)],
}


class Kills:
    def __init__(self, base, variants, seed, faults):
        self.base, self.faults, self.rng = base, faults, random.Random(seed)
        self.files, self.pair = Files(variants, base / "models"), Pair(base, faults)
        self.figures, self.answers, self.seen = collections.Counter(), {}, set()

    def run(self, count):
        with contextlib.suppress(Stuck), contextlib.closing(self.pair):
            self.pair.start(0, 1)
            self.ask_fresh_server()
            while self.figures["kills"] < count:
                kinds = [self.disturb(server) for server in self.pair.servers]
                self.wait_for_a_moment(kinds)
                self.pair.kill(0, 1)
                self.figures["with unfinished files"] += bool(leftovers(self.base))
                for kind in kinds:
                    self.figures[f"killed {kind}"] += 1
                    self.figures["kills"] += 1
                self.check_output()
                self.pair.start(0, 1)
                self.check_answers()
                print(f"{self.figures['kills']} kills, {self.figures['compared']} results compared", flush=True)
            self.pair.close()
            self.pair.start(0, 1)
            self.check_answers()
        return self.figures

    def ask_fresh_server(self):
        for prompt in (one for prompts in PROMPTS.values() for one in prompts):
            job = Job(self.pair.servers[0], prompt, self.files, self.faults)
            assert job.finish() == "done", self.faults.found
            self.answers[job.key] = job.digests

    def disturb(self, server):
        kind = self.rng.choice(list(PROMPTS))
        prompt = self.rng.choice(PROMPTS[kind])
        job = Job(server, prompt, self.files, self.faults)
        if kind == "writing":
            job.finish()
            threading.Thread(target=self.evict, args=(server,), daemon=True).start()
        return kind

    def wait_for_a_moment(self, kinds):
        """Any moment from when a file is begun, where one will be."""
        end = time.monotonic() + 20
        while set(kinds) != {"sampling"} and not leftovers(self.base) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(self.rng.random() ** 2)  # short ones more often

    def evict(self, server):
        with contextlib.suppress(OSError, ValueError):  # it is killed meanwhile
            server.post("spillway/free", {"cache": True})

    def check_output(self):
        """Whatever lies under a final name is whole, and what its prompt makes on a fresh server."""
        for half in half_files(self.base):
            self.faults.add("half file", half)
        for path in sorted((self.base / "output" / "ours").glob("[!.]*.safetensors")):
            prompt = json.loads(header_of(path)[0]["__metadata__"]["prompt"])
            history = {"outputs": {"save": {"text": [f"{path.name}: "]}}}
            self.compare(key_of(prompt, self.files), digests(self.base, prompt, history), f"the file {path.name}")
            self.figures["whole files after kills"] += 1
        shutil.rmtree(self.base / "output" / "theirs", ignore_errors=True)
        for path in (self.base / "output" / "ours").glob("[!.]*.safetensors"):
            path.unlink()

    def check_answers(self):
        for server in self.pair.servers:
            prompt = self.rng.choice(PROMPTS[self.rng.choice(list(PROMPTS))])
            job = Job(server, prompt, self.files, self.faults)
            if job.finish() == "done":
                self.compare(job.key, job.digests, "after a start")
                self.figures["compared"] += 1

    def compare(self, key, found, words):
        if self.answers.get(key) != found:
            self.faults.add("another result", f"{words}: {found}, wanted {self.answers.get(key)} of {key}")


def kills(base, variants, count, seed, faults):
    """Kill servers so many times. Returns the figures."""
    return Kills(base, variants, seed, faults).run(count)
