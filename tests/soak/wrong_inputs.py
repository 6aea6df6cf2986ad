"""Many prompts with inputs that make no sense, over every input of every node of ours, and requests to every route."""

import collections
import contextlib
import random

from .files import Files
from .fuzz import Fuzz, request
from .invariants import half_files
from .jobs import Job, Stuck
from .mix import known_good
from .servers import Pair

AT_ONCE = 25


def wrong_inputs(base, variants, count, seed, faults):
    """Run so many prompts on one server. Returns the figures."""
    figures = collections.Counter()
    files, pair = Files(variants, base / "models"), Pair(base, faults)
    with contextlib.suppress(Stuck), contextlib.closing(pair):
        pair.start(0)
        server = pair.servers[0]
        rng = random.Random(seed)
        fuzz = Fuzz(server, rng)
        while fuzz.count < count and server.is_up:
            made = [fuzz.prompt() for _ in range(min(AT_ONCE, count - fuzz.count))]
            jobs = [(Job(server, prompt, files, faults), kind, given) for prompt, kind, given in made]
            for job, kind, given in jobs:
                outcome = job.finish(may_fail=True, given=given)
                figures[outcome] += 1
                figures[f"{kind}: {outcome}"] += 1
                figures["reached execution"] += outcome in ("done", "error")
            for path, body, method, headers in (request(rng) for _ in made):
                figures["requests"] += 1
                with contextlib.suppress(OSError, ValueError):  # what urllib or aiohttp does not let through
                    server.ask(path, body, method, **headers)
            good = Job(server, known_good("theirs", fuzz.count), files, faults)
            if good.finish() != "done":
                faults.add("worker", f"a good prompt is {good.outcome}")
        figures["inputs"] = len(fuzz.turn)
    for half in half_files(base):
        faults.add("half file", half)
    return figures
