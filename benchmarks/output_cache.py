"""The output cache and the core's own on traces of prompts: seconds for what had been made before. Needs ComfyUI.

    python dev.py bench output_cache                    # all traces
    python dev.py bench output_cache --only seeds       # one of them

Runs in ComfyUI's own Python, found as for the host tests, in its real executor; see _replay.py for what is simulated.
All get the same RAM: what a cache may keep is the trace's RAM less the headroom, which is the core's default for it.
LRU counts entries and not bytes: it gets the largest count with which it keeps no more than that on the trace.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import _report as report
from _host import find_host, start_core
from _pack import ROOT, load_pack

TRACES = sorted((ROOT / "benchmarks" / "traces").glob("*.json"))
CORE, CORE_SAME, LRU, OURS = "core's default", "core, one headroom", "LRU", "Spillway"
MOST_ENTRIES = 512


def headroom(ram_gb: float) -> float:
    """GB that the core keeps free by default."""
    return min(10.0, max(2.0, 0.1 * ram_gb))


# -- in ComfyUI's Python


def measure(paths: list[Path]) -> dict[str, Any]:
    import _replay
    import execution

    from spillway.cache.comfyui import install

    found = {}
    for path in paths:
        trace = _replay.read_trace(path)
        ram = float(trace["ram_gb"])
        room = headroom(ram)
        core = {"ram": room, "ram_inactive": min(128.0, ram)}
        rows = {
            CORE: _replay.replay(trace, "core", "RAM_PRESSURE", core),
            CORE_SAME: _replay.replay(trace, "core", "RAM_PRESSURE", {"ram": room, "ram_inactive": room}),
            LRU: best_lru(_replay, trace, ram - room),
        }
        own = execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache
        assert install.install()
        rows[OURS] = _replay.replay(trace, "ours", "RAM_PRESSURE", core)
        execution.CacheSet.init_ram_cache, execution.CacheSet.init_classic_cache = own
        found[path.stem] = {"ram_gb": ram, "prompts": len(trace["prompts"]), "rows": rows}
    return {"traces": found, "speed": speed()}


def best_lru(replay: ModuleType, trace: dict[str, Any], room: float) -> dict[str, Any]:
    """The run with the most entries that keeps no more than `room` GB."""
    low, high, best = 1, MOST_ENTRIES, None
    while low <= high:
        count = (low + high) // 2
        run = replay.replay(trace, "core", "LRU", {"lru": count, "ram": 0.0, "ram_inactive": 0.0})
        if run["kept_gb"] <= room:
            best, low = {**run, "entries_allowed": count}, count + 1
        else:
            high = count - 1
    # It never drops what the last prompt used. Where that alone takes more, there is no smaller cache than this.
    return best or {**run, "entries_allowed": 1, "over": True}


def speed() -> dict[str, float]:
    """With 10,000 entries: milliseconds to choose, microseconds of a lookup in ours and the core's. Least of 15."""
    import asyncio

    import torch
    from comfy_execution import caching

    from spillway.cache.choose import choose
    from spillway.cache.comfyui import install

    class Keys:
        """Key sets are the core's work, and the same for all caches."""

        def __init__(self, keys: dict[str, Any]) -> None:
            self.get_data_key = keys.get

    keys = {str(i): frozenset([(0, frozenset([(0, "Node"), (1, i)]))]) for i in range(10_000)}
    rng = random.Random(1)
    ours = install.make_cache()
    core = caching.LRUCache(caching.CacheKeySetInputSignature, max_size=20_000)
    for cache in (ours, core):
        cache.cache_key_set, cache.initialized = Keys(keys), True
    engine = ours.engine
    for number, (_, key) in enumerate(keys.items()):
        if number % 100 == 0:
            engine.begin_prompt([])
        tensor = torch.empty(rng.randrange(1, 1000))
        parents = [keys[str(number - 1)]] if number % 5 else []
        kind = f"kind {number % 20}"
        engine.put(key, number, [tensor], seconds=rng.random() * 10, kind=kind, parents=parents)
        core.cache[key] = number

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
    found["lookup_core_us"] = asyncio.run(lookups(core))
    return found


# -- in the parent


def table(traces: dict[str, Any]) -> str:
    """Seconds for what had been made before, and in brackets the most that was alive at once."""
    columns = (CORE, CORE_SAME, LRU, OURS)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [path.stem for path in TRACES]
    parser.add_argument("--only", action="append", choices=names, help="this trace; may be repeated")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    paths = [path for path in TRACES if not args.only or path.stem in args.only]
    if args.inside:
        start_core(args.inside)
        load_pack()
        logging.disable(logging.INFO)
        args.result.write_text(json.dumps(measure(paths)))
        return 0
    comfyui, python = find_host()
    with tempfile.TemporaryDirectory(prefix="spillway-cache-") as folder:
        result = Path(folder) / "result.json"
        only = [part for path in paths for part in ("--only", path.stem)]
        command = [str(python), __file__, "--inside", str(comfyui), "--result", str(result), *only]
        if subprocess.run(command).returncode:
            return 1
        found = json.loads(result.read_text())
    print(table(found["traces"]))
    print("\n!: keeps more than it was given, as the outputs of one prompt alone take more")
    print("\n10,000 entries: " + ", ".join(f"{name} {value:.2f}" for name, value in found["speed"].items()))
    if args.json:
        report.write(args.json, report.result(**found, host=report.host_versions(comfyui, python)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
