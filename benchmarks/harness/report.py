"""What all benchmarks take and write: their arguments, a table for people, JSON for programs, and the machine."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from .pack import ROOT

PACKAGES = "torch safetensors accelerate diffusers RamTorch mmgp numpy comfy-aimdo comfy-kitchen".split()  # noqa: SIM905


def parser(about: str | None) -> argparse.ArgumentParser:
    """Make a benchmark's arguments. about: its module's docstring."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    return made


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=cores(), help="threads of torch (default %(default)s)")


def publish(path: Path | None, *lines: str, **figures: Any) -> int:
    """Print the lines, and write the figures where a path was given; return the exit status."""
    print("\n" + "\n\n".join(lines))
    if path is not None:
        write(path, result(**figures))
    return 0


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Return the CPU, its cores, the RAM and the system."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "ram_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, as far as this process's Python has them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def comfyui_versions(comfyui: Path, python: Path) -> dict[str, str]:
    """Return the versions of ComfyUI and of what its own Python has installed."""
    found = {}
    for line in (comfyui / "comfyui_version.py").read_text().splitlines():
        if line.startswith("__version__"):
            found["ComfyUI"] = line.split("=")[1].strip().strip("\"'")
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "have = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **{n: have[n] for n in sys.argv[1:] if n in have}}))"
    )
    done = subprocess.run([str(python), "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
    return {**found, **json.loads(done.stdout)}


def result(**figures: Any) -> dict[str, Any]:
    """Add the date, the command, the machine and the versions to the figures."""
    script, *arguments = sys.argv
    name = Path(script).stem
    # The folders of files are not recorded.
    shown = [Path(a).name if os.sep in a else a for a in arguments]
    return {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "dev.py", "bench", name, *shown]),
        "machine": machine(),
        "versions": versions(),
        **figures,
    }


def write(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the result file; it appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(figures, indent=2) + "\n")
    partial.replace(path)
    print(f"figures: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a Markdown table with its first column aligned left and the others right."""
    rows = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return " | ".join(["| " + cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    rule = "|".join(["|" + "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def ratio(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Return the median of the ratios of values that were measured in the same round."""
    return median([value / other for value, other in zip(values, reference, strict=False) if other])


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"
