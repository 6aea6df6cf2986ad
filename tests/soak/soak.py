"""Rounds of the mix: prompts and disturbances on two servers, and then all results compared with a fresh one's."""

import collections
import contextlib
import json
import random
import shutil
import time

from .compare import Reference
from .disturb import DISTURBANCES, RARE
from .files import REPLACED, VARIANTS, WAYS, Files
from .fuzz import Fuzz
from .invariants import half_files
from .jobs import Job, Stuck
from .mix import known_good, random_graph
from .servers import Pair

ROUND_SECONDS = 300
# Of a round's time: the rest is the start of a fresh server and its answers.
DISTURBED = 0.6


class Round:
    """Two servers in `base`, and what was found. variants: the folder of all model files."""

    def __init__(self, base, variants, rng, faults):
        self.base, self.variants, self.rng, self.faults = base, variants, rng, faults
        self.files = Files(variants, base / "servers" / "models")
        self.pair = Pair(base / "servers", faults)
        self.jobs, self.done, self.figures = [], [], collections.Counter()
        self.queue_cleared = False
        self.number = 0

    # -- what disturbances use

    def maybe(self, share):
        return self.rng.random() < share

    def any_server(self):
        return self.rng.choice(self.pair.servers)

    def graph(self, server, **options):
        name = f"theirs{self.pair.servers.index(server)}"
        return random_graph(self.rng, name, one_by_one=server.is_capped, **options)

    def send(self, server, client="soak", **options):
        self.jobs.append(Job(server, self.graph(server, **options), self.files, self.faults, client))

    def count(self, what, number=1):
        self.figures[what] += number

    def replace(self, name, way):
        self.files.replace(name, self.rng.choice(sorted({*range(VARIANTS[name])} - {self.files.current[name]})), way)
        self.count(f"file replaced {way}")

    def check_files(self):
        for half in half_files(self.pair.base):
            self.faults.add("half file", half)

    def finish_all(self):
        for job in self.jobs:
            self.count(f"prompts: {job.finish(may_be_lost=self.queue_cleared)}")
            if job.outcome == "done":
                self.done.append(job)
        self.jobs, self.queue_cleared = [], False

    # -- the round

    def run(self, seconds):
        """Every disturbance once, in a random order, and then for as long as there is time."""
        end = time.monotonic() + seconds * DISTURBED
        with contextlib.closing(self.pair):
            self.pair.start(0, 1)
            self.fuzz = Fuzz(self.pair.servers[0], self.rng)
            waiting = self.rng.sample(list(DISTURBANCES), len(DISTURBANCES))
            while waiting or time.monotonic() < end:
                name = waiting.pop() if waiting else self.rng.choice([one for one in DISTURBANCES if self.is_due(one)])
                self.disturb(name)
        with contextlib.closing(self.pair):
            self.start_again()
        self.compare()

    def is_due(self, name):
        return name not in RARE or self.maybe(0.2)

    def disturb(self, name):
        begun = time.monotonic()
        for server in self.pair.servers:
            self.send(server)
        DISTURBANCES[name](self)
        self.count(name)
        self.finish_all()
        self.all_live()
        print(f"{time.monotonic() - begun:6.1f} s  {name}", flush=True)

    def all_live(self):
        """A prompt that is known to be good succeeds on every server."""
        for place, server in enumerate(self.pair.servers):
            self.number += 1
            job = Job(server, known_good(f"theirs{place}", self.number), self.files, self.faults)
            if job.finish() != "done":
                self.faults.add("worker", f"a good prompt is {job.outcome}")
            self.done.append(job)

    def start_again(self):
        """After both were down and files changed meanwhile, also those that are only read by ComfyUI's own nodes."""
        for name in REPLACED:
            if self.maybe(0.5) or name.startswith("embeddings/"):
                self.replace(name, self.rng.choice(WAYS))
        self.pair.start(0)
        (server, _) = self.pair.servers
        for job in self.rng.sample(self.done, min(6, len(self.done))):
            self.jobs.append(Job(server, job.prompt, self.files, self.faults))
        self.finish_all()
        self.check_files()

    def compare(self):
        reference = Reference(self.base / "reference", self.variants)
        with reference.server:
            for job in self.done:
                if job.digests:
                    wanted = reference.answer(job.key)
                    self.count("compared")
                    wrong = [name for name in job.digests if job.digests[name] != wanted.get(name)]
                    if wrong:
                        kinds = [job.prompt[name]["class_type"] for name in wrong]
                        self.faults.add("another result", f"{wrong} {kinds} of {job.key} {json.dumps(job.prompt)}")
        self.count("answers of fresh servers", len(reference.answers))


def soak(base, variants, seconds, seed, faults):
    """Run rounds for so long. Returns the figures."""
    rng, figures = random.Random(seed), collections.Counter()
    begun = time.monotonic()
    while not faults.found and ((left := seconds - (time.monotonic() - begun)) > 0 or not figures):
        folder = base / f"round-{figures['rounds']}"
        folder.mkdir()
        for part in ("servers", "reference"):
            (folder / part).mkdir()
        one = Round(folder, variants, rng, faults)
        with contextlib.suppress(Stuck):  # which is a fault that was noted
            one.run(min(left, ROUND_SECONDS))
        figures += one.figures
        figures["rounds"] += 1
        if not faults.found:
            shutil.rmtree(folder)
    figures["seconds"] = int(time.monotonic() - begun)
    return figures
