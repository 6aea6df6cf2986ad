"""Benchmarks that run in ComfyUI: where it is, ComfyUI set up in this process, and the main of each benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from . import report
from .device import CPU, finish_comfyui, prepare_comfyui, settle, used_bytes
from .laps import Laps, contest
from .pack import ROOT, load_pack
from .race import command_of, must_have_run, solo

WRITE = "write"  # the contestant that writes the files, and is not measured

# -- in the parent


class Outcome(NamedTuple):
    """What a benchmark found: lines to print, and figures for the result file."""

    lines: tuple[str, ...]
    figures: Mapping[str, Any]


Body = Callable[[argparse.Namespace, Laps], None]
Measure = Callable[[argparse.Namespace, Callable[[str], list[str]]], Outcome]


def parser(about: str | None) -> argparse.ArgumentParser:
    """Make the arguments of a benchmark whose contestants run in ComfyUI."""
    made = report.parser(about)
    report.add_threads(made)
    made.add_argument("--contestant", help=argparse.SUPPRESS)
    for of_a_contestant in ("--base", "--comfyui"):
        made.add_argument(of_a_contestant, type=Path, help=argparse.SUPPRESS)
    return made


def add_flux(parser: argparse.ArgumentParser, hidden: int, words: str, size: int | None = None) -> None:
    """Add the sizes of a Flux and its image. hidden: the default width; words: what that makes."""
    parser.add_argument("--hidden", type=int, default=hidden, help=f"width of the model: {words}")
    if size is not None:
        parser.add_argument("--size", type=int, default=size, help="pixels per side (default %(default)s)")


def run(args: argparse.Namespace, contestant: Body, measure: Measure, *, write: Body | None = None) -> int:
    """Be the main of a benchmark: the parent that measures, or the process of one contestant.

    write: makes files in `args.base` first, in ComfyUI's Python. measure: is given the arguments and what makes a
    contestant's command from its name.
    """
    if args.contestant:
        body = write if args.contestant == WRITE else contestant
        assert body is not None
        return contest(lambda laps: body(args, laps))
    args.comfyui, python = find_comfyui()
    kept = getattr(args, "folder", None)
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory(prefix="spillway-bench-") as folder:
        args.base = Path(folder)

        def command(name: str) -> list[str]:
            return command_of(python, name, "--base", args.base, "--comfyui", args.comfyui)

        if write is not None:
            must_have_run(solo(WRITE, command(WRITE), 1, args.threads))
        lines, figures = measure(args, command)
    return report.publish(args.json, *lines, comfyui=report.comfyui_versions(args.comfyui, python), **figures)


def find_comfyui() -> tuple[Path, Path]:
    """Return ComfyUI's folder and the Python that runs it, found as for its tests; end the program without them."""
    finder = comfyui_finder()
    try:
        comfyui = finder.find_comfyui()
        python = comfyui and finder.find_comfyui_python(comfyui)
    except finder.WrongVariable as error:
        sys.exit(str(error))
    if not python:
        sys.exit("no ComfyUI found, or no Python for it: set COMFYUI_PATH and COMFYUI_PYTHON")
    return comfyui, python


@cache
def comfyui_finder() -> ModuleType:
    """Load the file of the tests that knows how to find ComfyUI and its Python."""
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module("kit.find_comfyui")


# -- in ComfyUI's Python


def start_comfyui(
    comfyui: Path,
    base: Path | None = None,
    device: str = CPU,
    *,
    dynamic_vram: bool = False,
    card_bytes: int | None = None,
) -> None:
    """Import ComfyUI as ``main.py`` would have set it up. base: holds its folders; None: its own do. device: CPU is
    ``--cpu``; on any other ComfyUI chooses. dynamic_vram: as its default on a card is; else it is disabled.
    card_bytes: what the card is to be said to have in all.
    """
    sys.path.insert(0, str(comfyui))
    sys.path.append(str(ROOT / "tests"))  # for checkpoints and sampling
    if device != CPU:
        prepare_comfyui(device, dynamic_vram, card_bytes)
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == CPU
    if base is not None:
        comfy.cli_args.args.base_directory = str(base)
    import comfy.sample
    import comfy.sd
    import nodes  # noqa: F401 - ComfyUI's

    if device != CPU:
        finish_comfyui()


def load_installed_pack() -> None:
    """Load the pack with the allocator as its prestartup script sets it in a server."""
    load_pack()
    from spillway.ops.ram import allocator

    allocator.tune()


def sample_in_turns(
    laps: Laps,
    model: Any,
    args: argparse.Namespace,
    facts: Callable[[], Mapping[str, Any]],
    tokens: int | None = None,
    conds: Callable[[], Any] | None = None,
) -> Any:
    """Run ComfyUI's sampler once and return the latents; it waits for its turn before each step.

    facts: what is told after each step. tokens: of the text. conds: makes the texts, in the first step's time.
    """
    import comfy.model_management

    from kit.comfyui import sampling

    def after_step(step: int, *_: Any) -> None:
        device = comfy.model_management.get_torch_device()
        settle(device)
        laps.stop()
        laps.tell(**facts(), device_bytes=used_bytes(device))
        if step + 1 < args.steps:
            laps.begin("step")

    laps.begin("first")
    size = {"width": args.size, "height": args.size}
    cond = conds() if conds else sampling.conds(model, tokens=tokens)
    return sampling.sample(model, steps=args.steps, **size, cond=cond, callback=after_step)


class Server:
    """What the executor asks of a server that nobody is connected to."""

    client_id = None
    last_node_id = None

    def send_sync(self, *_: Any) -> None:
        pass
