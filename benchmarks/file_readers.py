"""Reads a file of weights into host memory, as steps do whose weights have no room in RAM: by whom, how fast, how busy.

    python dev.py bench file_readers                        # a file of 2 GB, from the disk and from the page cache
    python dev.py bench file_readers --gb 8 --rounds 5 --json result.json
    python dev.py bench file_readers --comfy-aimdo 0.6.0    # beside comfy-aimdo's own readers, on a simulated driver

"map" and "past the page cache" are Spillway's readers, as many as it takes on this machine, and one alone. "the disk"
is one thread that does nothing else (O_DIRECT). Linux alone. All run in turns in one process; medians of the rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from harness import report
from harness.pack import ROOT, load_pack

load_pack()
from spillway.ops.device.locked_memory import anonymous
from spillway.ops.device.readers import Threads, reader_count
from spillway.ops.files.disk_map import DiskMap, read_past_cache
from spillway.ops.gather import Read, copy_into

WEIGHT = 64 << 20  # bytes: a large layer in 16 bit
DISK, AIMDO = "the disk", "comfy-aimdo"


class Copying:
    """The work of a reader: one weight into memory that is there."""

    def __init__(self, target: torch.Tensor, weight: torch.Tensor, read: Read | None) -> None:
        self.target, self.weight, self.read = target, weight, read

    def fill(self) -> None:
        copy_into(self.target, self.weight, alone=True, read=self.read)

    def undo(self) -> None: ...


def by_readers(disk_map: DiskMap, count: int, read: Read | None) -> Callable[[], None]:
    """Let so many of the engine's readers bring every weight, each into memory of its own."""
    readers, targets = Threads(count), [torch.ones(WEIGHT, dtype=torch.uint8) for _ in range(count)]

    def bring() -> None:
        jobs = []
        for number, key in enumerate(disk_map):
            if number >= count:
                jobs[number - count].wait()
            jobs.append(readers.submit(Copying(targets[number % count], disk_map.tensor(key), read)))
        for job in jobs:
            job.wait()

    return bring


def by_the_disk(path: Path) -> Callable[[], None]:
    memory = anonymous(16 << 20)

    def bring() -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            while os.readv(fd, [memory]):
                pass
        finally:
            os.close(fd)

    return bring


def by_aimdo(path: Path, disk_map: DiskMap, version: str) -> Callable[[], None]:
    """Let comfy-aimdo's pool bring every weight, asked by one thread as ComfyUI does."""
    sys.path.insert(0, str(ROOT / "tests"))
    from cuda_sim.aimdo import load_aimdo

    load_aimdo(version, 4 << 30)
    from comfy_aimdo.host_buffer import HostBuffer

    buffer, file = HostBuffer(WEIGHT), path.open("rb")

    def bring() -> None:
        for key in disk_map:
            spec = disk_map.spec(key)
            buffer.read_file_slice(file, spec.offset, spec.nbytes)

    return bring


def make_file(folder: Path, nbytes: int) -> Path:
    """Write random numbers, which no disk can compress, as a safetensors file. Its weights lie off the blocks."""
    from safetensors.torch import save_file

    path, numbers = folder / "weights.safetensors", torch.randint(0, 256, (WEIGHT,), dtype=torch.uint8)
    save_file({f"{n}.weight": numbers.roll(n) for n in range(max(1, nbytes // WEIGHT))}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path


def forget(path: Path, disk_map: DiskMap) -> None:
    """Let the page cache forget the file, which it can only where nothing of it is mapped."""
    disk_map.drop(0, disk_map.file_bytes)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="of the file (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the file is written (default: that of temporary files)")
    parser.add_argument("--comfy-aimdo", metavar="VERSION", help="that release too, on the tests' simulated driver")
    args = parser.parse_args()
    if not hasattr(os, "O_DIRECT"):
        parser.error("this system has no reads past its page cache: run it on Linux")

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = make_file(Path(folder), int(args.gb * 1e9))
        disk_map = DiskMap(path)
        count = reader_count()
        runs = {DISK: by_the_disk(path)}
        for number in sorted({1, count, 4}):
            readers = f"{number} reader{'s' * (number > 1)}"
            runs[f"map, {readers}"] = by_readers(disk_map, number, None)
            runs[f"past the page cache, {readers}"] = by_readers(disk_map, number, read_past_cache)
        if args.comfy_aimdo:
            runs[f"{AIMDO} {args.comfy_aimdo}"] = by_aimdo(path, disk_map, args.comfy_aimdo)
        figures = measure(runs, path, disk_map, args.rounds)
    read_ahead = [p.read_text().strip() for p in sorted(Path("/sys/block").glob("*/queue/read_ahead_kb"))]
    return report.publish(
        args.json,
        f"A file of {disk_map.file_bytes / 1e9:.1f} GB in weights of {WEIGHT >> 20} MiB, medians of {args.rounds} "
        f"rounds, disks that read {'/'.join(dict.fromkeys(read_ahead))} KB ahead:",
        table(figures),
        rows=figures,
        file_bytes=disk_map.file_bytes,
        rounds=args.rounds,
        read_ahead_kb=read_ahead,
    )


def measure(
    runs: dict[str, Callable[[], None]], path: Path, disk_map: DiskMap, rounds: int
) -> dict[str, dict[str, float]]:
    """Return GB/s and seconds of CPU for a GB of each, from the disk and from the page cache."""
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for where in ("cold", "cached"):
                if name == DISK and where == "cached":
                    continue
                if where == "cold":
                    forget(path, disk_map)
                else:
                    with path.open("rb") as file:
                        while file.read(WEIGHT):
                            pass
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                gigabytes = disk_map.file_bytes / 1e9
                taken[name].setdefault(f"{where}_gb_per_s", []).append(gigabytes / wall)
                taken[name].setdefault(f"{where}_cpu_s_per_gb", []).append(cpu / gigabytes)
    return {name: {key: statistics.median(values) for key, values in own.items()} for name, own in taken.items()}


def table(figures: dict[str, dict[str, float]]) -> str:
    limit = figures[DISK]["cold_gb_per_s"]
    columns = ["", "from the disk, GB/s", "of the disk", "CPU, s/GB", "from the page cache, GB/s", "CPU, s/GB"]
    lines = []
    for name, own in figures.items():
        cold, busy = own["cold_gb_per_s"], own["cold_cpu_s_per_gb"]
        cached = [f"{own[key]:.2f}" if key in own else "" for key in ("cached_gb_per_s", "cached_cpu_s_per_gb")]
        lines.append([name, f"{cold:.2f}", f"{cold / limit:.2f}", f"{busy:.2f}", *cached])
    return report.table(columns, lines)


if __name__ == "__main__":
    sys.exit(main())
