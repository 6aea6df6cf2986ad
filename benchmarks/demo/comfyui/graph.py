"""Run the demo's checkpoint in a real ComfyUI, as a graph queued over HTTP."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

from harness.comfyui import comfyui_finder
from harness.pack import ROOT

from ..checkpoint import CACHE
from ..progress import Bar
from .companions import ensure_companions
from .server import Server, ServerError

WORKFLOW = Path(__file__).resolve().parent / "workflow_api.json"
DEFAULT_IMAGE = CACHE / "comfyui.png"
OUR_LOADER, COMFYUI_LOADER = "SpillwayLoadDiffusionModel", "UNETLoader"
SAMPLER_STEP = re.compile(r"(\d+)/(\d+) \[")  # the step counter of the sampler's own bar in the log


def make_graph(checkpoint: Path, text_encoder: Path, vae: Path, args: argparse.Namespace) -> dict:
    """Fill names, size, steps and seed into the workflow file wherever a node has such an input."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    values = {
        "unet_name": checkpoint.name,
        "clip_name": text_encoder.name,
        "vae_name": vae.name,
        "width": args.size,
        "height": args.size,
        "steps": args.steps,
        "seed": args.seed,
    }
    for node in graph.values():
        node["inputs"] = {name: values.get(name, value) for name, value in node["inputs"].items()}
        if args.comfyui_loader and node["class_type"] == OUR_LOADER:
            node["class_type"] = COMFYUI_LOADER
    return graph


def _run_graph(server: Server, graph: dict, steps: int) -> tuple[dict, float]:
    """Queue the graph and wait for it; return its history entry and the seconds it took."""
    begun = time.monotonic()
    prompt = server.queue(graph)
    with Bar("running the graph", steps, " steps") as bar:
        while (entry := server.result(prompt)) is None:
            seen = SAMPLER_STEP.findall(server.log())
            bar.update(int(seen[-1][0]) if seen else 0, f"{time.monotonic() - begun:.0f} s")
            time.sleep(0.2)
        bar.update(steps)
    return entry, time.monotonic() - begun


def _texts(entry: dict) -> list[str]:
    """Return all text that the graph's nodes returned to the interface, in the order of the nodes."""
    items = [item for output in entry["outputs"].values() for item in output.get("text", [])]
    return [item if isinstance(item, str) else json.dumps(item, indent=2) for item in items]


def run(args: argparse.Namespace, checkpoint: Path) -> int:
    """Start ComfyUI, run the graph, save the image, print what came back; return the exit status."""
    comfyui = args.comfyui.expanduser().resolve()
    finder = comfyui_finder()
    python = args.comfyui_python or finder.find_comfyui_python(comfyui)
    if not finder.is_comfyui(comfyui) or not python:
        print(f"{comfyui} is no ComfyUI, or has no Python: see --comfyui and --comfyui-python", file=sys.stderr)
        return 1
    text_encoder, vae = ensure_companions(checkpoint.parent)
    graph = make_graph(checkpoint, text_encoder, vae, args)
    with tempfile.TemporaryDirectory(prefix="spillway-comfyui-", ignore_cleanup_errors=True) as base:
        try:
            with Server(comfyui, str(python), Path(base), ROOT, checkpoint.parent) as server:
                with Bar("starting ComfyUI", 1) as bar:
                    server.wait_until_started(lambda waited: bar.update(0, f"{waited:.0f} s"))
                    bar.update(1)
                missing = {node["class_type"] for node in graph.values()} - server.node_types()
                if missing:
                    names = ", ".join(sorted(missing))
                    raise ServerError(f"this ComfyUI has no node {names}:\n{server.log_tail(60)}")
                entry, seconds = _run_graph(server, graph, args.steps)
                image = next(out["images"][0] for out in entry["outputs"].values() if out.get("images"))
                args.image.parent.mkdir(parents=True, exist_ok=True)
                args.image.write_bytes(server.view(image))
                log = server.log()
        except ServerError as error:
            print(f"FAILED: {error}", file=sys.stderr)
            return 1
    print(f"\n{checkpoint.name} in ComfyUI: the graph took {seconds:.1f} s")
    print(f"image: {args.image}")
    for text in _texts(entry):
        print(f"\n{text}")
    said = [line for line in log.splitlines() if "spillway" in line.lower() and base not in line]
    if said:
        print("\nin ComfyUI's log:")
        print("\n".join(f"  {line}" for line in said))
    return 0
