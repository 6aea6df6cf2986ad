"""A comparison with ComfyUI as a text that says all of it to others, for an issue or a forum."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import comfy.model_management
import comfyui_version
import nodes as comfyui_nodes
import torch

from ..ops.device.identity import device_name, pack_version
from ..ops.ledger import in_words
from ..ops.ram.available import total_ram
from .compare_files import in_sentences

MOST_NODES = 8  # of a graph, the slowest, whose seconds are told


def text_of(comparison: Any) -> str:
    """Say what both runs of a `compare.Comparison` took and showed, on which machine, and what was the same in both."""
    runs = list(comparison.runs.values())
    rows = [("seconds", *(f"{run.seconds:.1f}" for run in runs))]
    rows.append(("most RAM of the process", *(in_words(run.rss) for run in runs)))
    for device in sorted({device for run in runs for device in run.peaks}):
        rows.append((f"most of {device}", *(in_words(run.peaks.get(device, 0)) for run in runs)))
    lines = table(list(comparison.runs), rows)
    if comparison.state == "done":
        lines += ["", *in_sentences(comparison.shown or {})]
    else:
        lines += ["", *(f"{kind}'s run: {run.state}." for kind, run in comparison.runs.items())]
    if comparison.same:
        lines.append(f"Spillway's in both runs, as ComfyUI has nothing like it: {', '.join(comparison.same)}.")
    if comparison.kept:
        lines.append(f"The second run had models of the first, which another pack keeps: {', '.join(comparison.kept)}.")
    lines.append(
        "Each run began with no model loaded and nothing cached. ComfyUI's was the first, so the second found files in "
        "the page cache."
    )
    nodes = node_rows(comparison)
    if nodes:
        lines += ["", "Seconds of the slowest nodes:", "", *table(list(comparison.runs), nodes)]
    return "\n".join(["The same graph through ComfyUI's loaders and through Spillway's:", "", *lines, "", machine()])


def table(heads: list[str], rows: list[tuple[str, ...]]) -> list[str]:
    """Lay rows out in columns. The first column is as wide as its longest name."""
    wide = max(len(row[0]) for row in rows) + 2
    return [f"{name:<{wide}}" + "".join(f"{text:>12}" for text in texts) for name, *texts in [("", *heads), *rows]]


def node_rows(comparison: Any) -> list[tuple[str, ...]]:
    """Give the seconds of the nodes that took longest, of both runs. A loader that was replaced has both names."""
    runs = list(comparison.runs.values())
    slowest = sorted(
        {node for run in runs for node in run.nodes},
        key=lambda node: -max(run.nodes[node][1] for run in runs if node in run.nodes),
    )
    rows = []
    for node in slowest[:MOST_NODES]:
        names = dict.fromkeys(display_name(run.nodes[node][0]) for run in runs if node in run.nodes)
        seconds = (f"{run.nodes[node][1]:.2f}" if node in run.nodes else "-" for run in runs)
        rows.append((f"{' / '.join(names)} #{node}", *seconds))
    return rows


def display_name(kind: str) -> str:
    """Return the name that users see of a class of nodes."""
    return str(comfyui_nodes.NODE_DISPLAY_NAME_MAPPINGS.get(kind) or kind)


def machine() -> str:
    """Name this machine and what runs on it."""
    device = comfy.model_management.get_torch_device()
    facts: list[Any] = [
        f"{datetime.date.today():%Y-%m-%d}",
        f"Spillway {pack_version()}",
        f"ComfyUI {comfyui_version.__version__}",
        f"torch {torch.__version__}",
        f"Python {platform.python_version()}",
        platform.system(),
        f"{device_name(device)} ({device}, {in_words(comfy.model_management.get_total_memory(device))})",
        f"RAM {in_words(total_ram())}",
    ]
    return ", ".join(facts)
