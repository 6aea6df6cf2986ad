"""ComfyUI, for the benchmarks that run in it: where it is, and its core set up in this process."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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
    """ComfyUI's folder and the Python that runs it, found as for the host tests. Ends the program without them."""
    dev = _developer_commands()
    comfyui = dev.find_comfyui()
    python = comfyui and dev.find_comfyui_python(comfyui)
    if not python:
        sys.exit("no ComfyUI found, or no Python for it: set COMFYUI_PATH and COMFYUI_PYTHON")
    return comfyui, python


def _developer_commands() -> ModuleType:
    """dev.py, which knows how to find ComfyUI and its Python."""
    spec = importlib.util.spec_from_file_location("spillway_dev", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- in ComfyUI's Python


def start_core(comfyui: Path, base: Path | None = None) -> None:
    """Import the core as ``main.py --cpu`` would have set it up. base: holds its folders; None: its own do."""
    sys.path.insert(0, str(comfyui))
    sys.path.append(str(ROOT / "tests" / "host"))  # for checkpoints and sampling
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    if base is not None:
        comfy.cli_args.args.base_directory = str(base)
    import comfy.sample
    import comfy.sd
    import nodes  # noqa: F401 - the core's
