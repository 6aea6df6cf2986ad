"""ComfyUI, for the benchmarks that run in it: where it is, and its core set up in this process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _report as report
from _pack import ROOT

# -- in the parent


def contestant_parser(about: str | None, hidden: int, words: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark whose contestants load a Flux. hidden: its default width; words: what that makes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=hidden, help=f"width of the model: {words}")
    parser.add_argument("--threads", type=int, default=report.cores(), help="threads of torch (default %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    for of_a_contestant in ("--base", "--comfyui"):
        parser.add_argument(of_a_contestant, type=Path, help=argparse.SUPPRESS)
    return parser


def find_host() -> tuple[Path, Path]:
    """ComfyUI's folder and the Python that runs it, found as for the tests in it. Ends the program without them."""
    sys.path.append(str(ROOT / "tests"))
    from kit.find_comfyui import WrongVariable, find_comfyui, find_comfyui_python

    try:
        comfyui = find_comfyui()
        python = comfyui and find_comfyui_python(comfyui)
    except WrongVariable as error:
        sys.exit(str(error))
    if not comfyui or not python:
        sys.exit("no ComfyUI found, or no Python for it: set COMFYUI_PATH and COMFYUI_PYTHON")
    return comfyui, python


# -- in ComfyUI's Python


def start_core(comfyui: Path, base: Path | None = None) -> None:
    """Import the core as ``main.py --cpu`` would have set it up. base: holds its folders; None: its own do."""
    sys.path.insert(0, str(comfyui))
    sys.path.append(str(ROOT / "tests" / "kit" / "comfyui"))  # for checkpoints and sampling
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    if base is not None:
        comfy.cli_args.args.base_directory = str(base)
    import comfy.sample
    import comfy.sd
    import nodes  # noqa: F401 - the core's
