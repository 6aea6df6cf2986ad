"""The output cache and ComfyUI's own on traces of prompts: seconds for what had been made before. Needs ComfyUI.

    python dev.py bench output_cache                    # all traces
    python dev.py bench output_cache --only seeds       # one of them

Runs in ComfyUI's own Python, found as for its tests, in its real executor; see replay.py for what is simulated.
All get the same RAM: what a cache may keep is the trace's RAM less the headroom, which is ComfyUI's default for it.
LRU counts entries and not bytes: it gets the largest count with which it keeps no more than that on the trace.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from harness import comfyui, replay, report
from harness.laps import Laps
from harness.pack import ROOT, load_pack
from harness.race import must_have_run, solo

TRACES = sorted((ROOT / "benchmarks" / "traces").glob("*.json"))
COMFYUI, ONE_HEADROOM, LRU, OURS = "ComfyUI's default", "ComfyUI, one headroom", "LRU", "Spillway"
MOST_ENTRIES = 512


def headroom(ram_gb: float) -> float:
    """Return the GB that ComfyUI keeps free by default."""
    return min(10.0, max(2.0, 0.1 * ram_gb))


# -- in ComfyUI's Python


def run_contestant(args: argparse.Namespace, laps: Laps) -> None:
    comfyui.start_comfyui(args.comfyui)
    load_pack()
    logging.disable(logging.INFO)
    laps.begin("traces")
    traces, speeds = replay_all(args.only), speed()
    laps.stop()
    laps.tell(traces=traces, speed=speeds)


def replay_all(names: list[str] | None) -> dict[str, Any]:
    """Replay the traces with each of the caches. names: these traces only."""
    import execution

    from spillway.cache.comfyui import install

    found = {}
    for path in TRACES:
        if names and path.stem not in names:
            continue
        trace = replay.read_trace(path)
        ram = float(trace["ram_gb"])
        room = headroom(ram)
        default = {"ram": room, "ram_inactive": min(128.0, ram)}
        rows = {
            COMFYUI: replay.replay(trace, "RAM_PRESSURE", default),
            ONE_HEADROOM: replay.replay(trace, "RAM_PRESSURE", {"ram": room, "ram_inactive": room}),
            LRU: best_lru(trace, ram - room),
        }
        own = execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache
        assert install.install()
        rows[OURS] = replay.replay(trace, "RAM_PRESSURE", default, ours=True)
        execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache = own
        found[path.stem] = {"ram_gb": ram, "prompts": len(trace["prompts"]), "rows": rows}
    return found


def best_lru(trace: dict[str, Any], room: float) -> dict[str, Any]:
    """Return the run with the most entries that keeps no more than `room` GB."""
    low, high, best = 1, MOST_ENTRIES, None
    while low <= high:
        count = (low + high) // 2
        run = replay.replay(trace, "LRU", {"lru": count, "ram": 0.0, "ram_inactive": 0.0})
        if run["kept_gb"] <= room:
            best, low = {**run, "entries_allowed": count}, count + 1
        else:
            high = count - 1
    # It never drops what the last prompt used. Where that alone takes more, there is no smaller cache than this.
    return best or {**run, "entries_allowed": 1, "over": True}


def speed() -> dict[str, float]:
    """Time a choice (ms) and lookups in ours and ComfyUI's (us), with 10,000 entries. The least of 15 counts."""
    import asyncio

    import torch
    from comfy_execution import caching

    from spillway.cache.choose import choose
    from spillway.cache.comfyui import install

    class Keys:
        """Key sets are ComfyUI's work, and the same for all caches."""

        def __init__(self, keys: dict[str, Any]) -> None:
            self.get_data_key = keys.get

    keys = {str(i): frozenset([(0, frozenset([(0, "Node"), (1, i)]))]) for i in range(10_000)}
    rng = random.Random(1)
    ours = install.make_cache()
    comfyuis = caching.LRUCache(caching.CacheKeySetInputSignature, max_size=20_000)
    for cache in (ours, comfyuis):
        cache.cache_key_set, cache.initialized = Keys(keys), True
    engine = ours.engine
    for number, (_, key) in enumerate(keys.items()):
        if number % 100 == 0:
            engine.begin_prompt([])
        tensor = torch.empty(rng.randrange(1, 1000))
        parents = [keys[str(number - 1)]] if number % 5 else []
        kind = f"kind {number % 20}"
        engine.put(key, number, [tensor], seconds=rng.random() * 10, kind=kind, parents=parents)
        comfyuis.cache[key] = number

    def chosen(share: float) -> float:
        times = []
        for _ in range(15):
            begun = time.perf_counter()
            candidates = engine.candidates()
            choose(candidates, sum(candidates.freed) * share)
            times.append(time.perf_counter() - begun)
        return min(times) * 1e3

    async def lookups(cache: Any) -> float:
        times = []
        for _ in range(15):
            begun = time.perf_counter()
            for name in keys:
                await cache.get(name)
            times.append((time.perf_counter() - begun) / len(keys))
        return min(times) * 1e6

    found = {f"choose_{share:.1%}_ms": chosen(share) for share in (0.001, 0.1, 0.5)}
    found["lookup_ours_us"] = asyncio.run(lookups(ours))
    found["lookup_comfyui_us"] = asyncio.run(lookups(comfyuis))
    return found


# -- in the parent


def table(traces: dict[str, Any]) -> str:
    """Show seconds for what had been made before, and in brackets the most that was alive at once."""
    columns = (COMFYUI, ONE_HEADROOM, LRU, OURS)
    lines, sums = [], dict.fromkeys(columns, 0.0)
    for name, found in traces.items():
        cells = []
        for column in columns:
            row = found["rows"][column]
            sums[column] += row["again_s"]
            mark = " !" if row.get("over") else ""
            cells.append(f"{row['again_s']:.0f} ({row['peak_gb']:.1f}){mark}")
        lines.append((name, f"{found['ram_gb']:g}", str(found["prompts"]), *cells))
    lines.append(("sum", "", "", *(f"{sums[column]:.0f}" for column in columns)))
    return report.table(("trace", "RAM, GB", "prompts", *columns), lines)


def measure(args: argparse.Namespace, command: Callable[[str], list[str]]) -> comfyui.Outcome:
    run = solo("replay", command("replay"), 1, args.threads)
    must_have_run(run)
    traces, speeds = run.last()["traces"], run.last()["speed"]
    words = "!: keeps more than it was given, as the outputs of one prompt alone take more"
    times = "10,000 entries: " + ", ".join(f"{name} {value:.2f}" for name, value in speeds.items())
    return comfyui.Outcome((table(traces), words, times), {"traces": traces, "speed": speeds})


def main() -> int:
    parser = comfyui.parser(__doc__)
    names = [path.stem for path in TRACES]
    parser.add_argument("--only", action="append", choices=names, help="this trace; may be repeated")
    return comfyui.run(parser.parse_args(), run_contestant, measure)


if __name__ == "__main__":
    sys.exit(main())
