"""How a busy server answers: the queue while gigabytes of outputs are freed, and sampling while clients poll.

    python dev.py bench server_load             # both; needs ComfyUI, 9 GB of RAM and 5 GB of disk
    python dev.py bench server_load --only polled --rounds 9

`freed`: outputs of 3.1 GB are in the cache, its disk tier is on, and `POST /spillway/free` clears it, so that all of it
is written. Meanwhile `GET /queue` is asked over and over. `polled`: prompts sample in turns with and without clients
that ask for `GET /spillway/memory`, each again as soon as it is answered.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import comfyui, report
from harness.laps import Laps
from harness.race import must_have_run, solo
from harness.served_flux import duration, must_succeed, prompt, write_models

IMAGES, SIDE = 31, 2896  # each 100 MB in fp32
CLIENTS = 10
FREED, POLLED = "freed", "polled"


# -- in ComfyUI's Python


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui)  # for the modules that the files are written from
    laps.begin(args.contestant)
    figures = freed(args) if args.contestant == FREED else polled(args)
    laps.stop()
    laps.tell(**figures)


def freed(args: argparse.Namespace) -> dict[str, Any]:
    """Return the milliseconds of each answer of the queue while the cache is written to the disk."""
    from kit.comfyui.running_server import Server, node

    base = args.base / FREED
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Spillway.Cache.DiskGB": 8, "Spillway.Cache.DiskSeconds": 0}))
    with Server(base) as server:
        prompt: dict[str, Any] = {}
        for number in range(IMAGES):
            image = node("EmptyImage", width=SIDE, height=SIDE, batch_size=1, color=number)
            prompt[f"image {number}"] = image
            prompt[f"end {number}"] = node("PreviewAny", source=[f"image {number}", 0])
        must_succeed(server.run(prompt))
        settle(server)
        before = server.get("spillway/memory")["cache"]
        control = list(answers(server.port, 200))
        answer: list[Any] = []
        begun = time.perf_counter()
        asking = threading.Thread(target=lambda: answer.append(server.get("spillway/free", {"cache": True})))
        asking.start()
        found, written = [], 0.0
        for milliseconds in answers(server.port, 1 << 30):
            found.append(milliseconds)
            if not asking.is_alive():
                written = written or time.perf_counter() - begun
            if written and len(found) % 100 == 0 and is_written(base, IMAGES):
                break
            if time.perf_counter() - begun > 120:
                raise SystemExit("the outputs were not written within two minutes")
        seconds = time.perf_counter() - begun
        after = server.get("spillway/memory")["cache"]
    return {
        "before": before, "after": after, "answer": answer, "free_s": written, "written_s": seconds,
        "queue": spread(found), "control": spread(control),
    }  # fmt: skip


def is_written(base: Path, count: int) -> bool:
    folders = [path for path in base.rglob("*") if path.is_file() and path.stat().st_size > 90e6]
    return len(folders) >= count


def settle(server: Any) -> None:
    server.wait(lambda: not server.get("queue")["queue_running"], 60)
    time.sleep(2)


def answers(port: int, count: int) -> Iterator[float]:
    """Ask for the queue, 200 times a second at most; yield milliseconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for _ in range(count):
        begun = time.perf_counter()
        connection.request("GET", "/queue")
        connection.getresponse().read()
        yield (time.perf_counter() - begun) * 1e3
        time.sleep(0.005)


def spread(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {
        "count": len(ordered),
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "max_ms": ordered[-1],
    }


def polled(args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of prompts without and with clients, in turns."""
    from kit.comfyui.running_server import Server

    base = args.base / POLLED
    write_models(base, hidden=1024)

    seconds: dict[str, list[float]] = {"alone": [], POLLED: []}
    reports = 0
    with Server(base) as server:
        must_succeed(server.run(prompt(args.steps, 0)))
        settle(server)
        for number in range(2 * args.rounds):
            asks = number % 4 in (1, 2)  # each comes first in every other round, so that a drift is nobody's
            with clients(server.port, CLIENTS if asks else 0) as counts:
                run = server.run(prompt(args.steps, 1 + number))
                must_succeed(run)
                reports += sum(counts)
            seconds[POLLED if asks else "alone"].append(duration(run))
    pairs = [asked / alone for alone, asked in zip(seconds["alone"], seconds[POLLED], strict=True)]
    return {"prompt_s": seconds, "reports": reports, "ratio": statistics.median(pairs), "pairs": pairs}


@contextlib.contextmanager
def clients(port: int, count: int) -> Iterator[list[int]]:
    """Let that many clients ask for the report, each again as soon as it has one. Yields how many each got."""
    counts, done = [0] * count, threading.Event()

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while not done.is_set():
            connection.request("GET", "/spillway/memory")
            connection.getresponse().read()
            counts[number] += 1
        connection.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        done.set()
        for thread in threads:
            thread.join()


# -- in the parent


def measure(args: argparse.Namespace, command: Any) -> comfyui.Outcome:
    figures: dict[str, Any] = {}
    lines = []
    for part in [args.only] if args.only else [FREED, POLLED]:
        run = solo(part, command(part), 1, args.threads)
        must_have_run(run)
        figures[part] = found = run.last()
        if part == FREED:
            rows = [(name, *(f"{value:.1f}" for value in found[name].values())) for name in ("control", "queue")]
            lines.append(report.table(("GET /queue", "asked", "median, ms", "p99, ms", "max, ms"), rows))
            lines.append(f"answered after {found['free_s']:.2f} s, written after {found['written_s']:.1f} s")
        else:
            medians = {name: statistics.median(values) for name, values in found["prompt_s"].items()}
            words = f"{medians['alone']:.3f} s alone, {medians[POLLED]:.3f} s with {CLIENTS} clients"
            lines.append(f"a prompt: {words}; ratio {found['ratio']:.3f}; {found['reports']} reports were sent")
    return comfyui.Outcome(tuple(lines), figures)


def main() -> int:
    parser = comfyui.parser(__doc__)
    parser.add_argument("--only", choices=(FREED, POLLED))
    parser.add_argument("--rounds", type=int, default=7, help="prompts with and without clients (default %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="of a prompt (default %(default)s)")
    return comfyui.run(parser.parse_args(), run_contestant, measure)


if __name__ == "__main__":
    sys.exit(main())
