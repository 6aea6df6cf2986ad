"""A picture of one step: what computes, what the bus carries and what the readers read, in the engine and in a peer."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from kit.virtual.clock import COMPUTE, TO_DEVICE, TO_HOST, WAITS, Span

from .limits import limits
from .peers import ComfyUI
from .rows import Case, Runner

COLOURS = {COMPUTE: "#4c78a8", TO_DEVICE: "#f58518", TO_HOST: "#e45756", WAITS: "#bab0ac"}
OTHERS = "#54a24b"  # whoever reads or locks memory, grey where it waits


def draw(path: Path, runner: Runner, case: Case) -> None:
    """Draw the last step of a case, the engine's above ComfyUI's, with a line where the ideal step would end."""
    work = runner.work(case)
    budget = int(work.nbytes * case.share)
    ideal = limits(work, case.machine, case.ram_gb, budget).step
    steps = runner.run(case, spans=True)
    peer = ComfyUI(work, case.machine, case.ram_gb, budget)
    peer.seconds(3)
    peer.clock.spans = []
    begun = peer.clock.main.at
    peer.step()
    peers_step = peer.clock.main.at - begun

    figure, axes = plt.subplots(2, 1, figsize=(16, 7), sharex=True)
    form = case.dtype + (" + LoRA" if case.lora else "")
    figure.suptitle(f"{case.model}, {form}, {case.share:.0%} resident, {case.gpu}, {case.ram_gb} GB of RAM")
    _draw(axes[0], steps.spans, f"Spillway: {steps.seconds[-1]:.3f} s", ideal, steps.seconds[-1])
    _draw(axes[1], peer.clock.spans, f"ComfyUI's dynamic VRAM: {peers_step:.3f} s", ideal, peers_step)
    axes[1].set_xlabel("seconds; the dashed line is where an ideal step would end")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _joined(spans: list[Span]) -> list[list[float]]:
    """Join spans without a gap between them, or one that nobody could see."""
    joined: list[list[float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if joined and span.start <= joined[-1][1] + 2e-5:
            joined[-1][1] = max(joined[-1][1], span.end)
        else:
            joined.append([span.start, span.end])
    return joined


def _draw(axis: plt.Axes, spans: list[Span], title: str, ideal: float, took: float) -> None:
    first = [COMPUTE, TO_DEVICE, TO_HOST]
    lanes = [*first, *sorted({span.lane for span in spans} - {*first, WAITS}), WAITS]
    begun = min((span.start for span in spans), default=0.0)
    end = max((span.end for span in spans if span.lane == COMPUTE), default=0.0)
    begun = max(begun, end - took)
    labels = []
    for row, lane in enumerate(lanes):
        own = [span for span in spans if span.lane == lane]
        works, waits = ([span for span in own if (span.what == WAITS) == waiting] for waiting in (False, True))
        for which, colour in ((works, COLOURS.get(lane, OTHERS)), (waits, COLOURS[WAITS])):
            stretches = [(start - begun, end - start) for start, end in _joined(which)]
            axis.broken_barh(stretches, (row - 0.4, 0.8), facecolors=colour, linewidth=0)
        counted = waits if lane == WAITS else works
        inside = [span for span in counted if span.end > begun and span.start < end]
        busy = sum(min(span.end, end) - max(span.start, begun) for span in inside)
        shown = "launching thread waits" if lane == WAITS else lane
        labels.append(f"{shown} ({busy / took:.0%})" if took else shown)
    axis.axvline(ideal, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(lanes)), labels)
    axis.invert_yaxis()
    axis.set_title(title, loc="left")
