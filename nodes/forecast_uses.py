"""Walks back from the nodes that encode text, and that decode and encode pictures, to the loaders of what they use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import nodes as comfyui_nodes
from comfy_execution.graph_utils import is_link

from ..patcher.comfyui.forecast.companions import Tile
from ..patcher.comfyui.forecast.sampling import Latent
from ..patcher.comfyui.forecast.sketch import Loaded
from ..patcher.policy import Policy
from .forecast_latent import latent_of
from .forecast_walk import LORAS, MOST_STEPS, Found, Node, NotForeseen, literal, loras_of, node_of, wired_policy
from .load import NONE, model_path

TEXT, DECODE, ENCODE = "text", "decode", "encode"
CHECKPOINT_LOADERS = ("SpillwayLoadCheckpoint", "CheckpointLoaderSimple", "unCLIPCheckpointLoader")
OUR_LOADERS = ("SpillwayLoadCheckpoint", "SpillwayLoadCLIP", "SpillwayLoadVAE")
VAE_LOADERS = ("SpillwayLoadVAE", "VAELoader")
# By how many files they name: that of one has no number in the widget's name.
CLIP_LOADERS = {"CLIPLoader": 1, "DualCLIPLoader": 2, "TripleCLIPLoader": 3, "QuadrupleCLIPLoader": 4}
CLIP_LOADERS |= {f"{name}GGUF": count for name, count in CLIP_LOADERS.items()} | {"SpillwayLoadCLIP": 4}
# Nodes through which a text encoder or a VAE goes as large as it was.
THROUGH = ("SpillwayMakeDynamic", "SpillwaySeamlessTiling", "CLIPSetLastLayer")
# What has a widget for the edge of a tile. Spillway's nodes use it where one piece does not fit.
TILED = ("VAEDecodeTiled", "VAEEncodeTiled")
TILED_LAST = ("SpillwayVAEDecode", "SpillwayVAEEncode")


@dataclass
class Use(Found):
    """A node that encodes text, or uses a VAE. what: TEXT, DECODE or ENCODE.

    tile: None where it has no tiles. tiles_last: it goes over to them where one piece does not fit. text: of a prompt.
    quantised_by: id of the node that says in which format.
    """

    what: str = TEXT
    latent: Latent = field(default_factory=lambda: Latent(1024, 1024))
    tile: Tile | None = None
    tiles_last: bool = False
    text: str | None = None
    quantised_by: str | None = None


def uses(prompt: dict[str, Node]) -> list[tuple[str, str]]:
    """List (id, what) of the nodes that encode text, or decode or encode pictures."""
    found = []
    for name, node in prompt.items():
        inputs, kind = node["inputs"], node["class_type"]
        if is_link(inputs.get("vae")) and is_link(inputs.get("samples")) and _gives(kind, "IMAGE"):
            found.append((name, DECODE))
        elif is_link(inputs.get("vae")) and is_link(inputs.get("pixels")) and _gives(kind, "LATENT"):
            found.append((name, ENCODE))
        elif is_link(inputs.get("clip")) and _gives(kind, "CONDITIONING") and not is_link(inputs.get("conditioning")):
            found.append((name, TEXT))
    return found


def _gives(kind: str, wanted: str) -> bool:
    """Say whether a node of a class has such an output. A class that is not there could not run either."""
    return wanted in (getattr(comfyui_nodes.NODE_CLASS_MAPPINGS.get(kind), "RETURN_TYPES", None) or ())


def walk_use(prompt: dict[str, Node], name: str, what: str, of_graph: Policy | None) -> Use:
    """Find what a node uses. of_graph: the policy for models that have none. Raises NotForeseen."""
    node = prompt[name]
    kind, inputs = node["class_type"], node["inputs"]
    found = Use(name, kind, what=what)
    _find_loader(prompt, inputs["clip" if what == TEXT else "vae"], found)
    if what == TEXT:
        found.text = text if isinstance(text := inputs.get("text"), str) else None
    else:
        found.latent, _ = latent_of(prompt, inputs["samples" if what == DECODE else "pixels"], found.note)
        if kind in TILED or kind in TILED_LAST:
            found.tile = Tile(int(literal(inputs, "tile_size", kind)), int(inputs.get("temporal_size", Tile.frames)))
            found.tiles_last = kind in TILED_LAST
    own = found.loaded.policy
    found.loaded = replace(found.loaded, policy=own if own is not None else of_graph)
    return found


def _find_loader(prompt: dict[str, Node], link: list[Any], found: Use) -> None:
    side = "clip" if found.what == TEXT else "vae"
    loras: list[tuple[str, float]] = []
    quantised: dict[str, Any] = {}
    for _ in range(MOST_STEPS):
        name, node = str(link[0]), node_of(prompt, link)
        kind, inputs = node["class_type"], node["inputs"]
        loaded = _loaded(kind, inputs, found.what)
        if loaded is not None:
            policy = wired_policy(prompt, inputs.get("policy"), found)
            found.loader, found.ours = name, kind in OUR_LOADERS
            found.loaded = replace(loaded, policy=policy, loras=tuple(reversed(loras)), **quantised)
            if not found.ours:
                found.note("theirs", node=name, kind=kind)
            return
        if kind in LORAS and found.what == TEXT:
            loras += loras_of(prompt, node, side)
        elif kind == "SpillwayQuantiseModel":
            quantised = quantised or {"weight_dtype": inputs.get("clip_dtype", "auto")}
            found.quantised_by = found.quantised_by or name
        elif kind not in THROUGH:
            found.note("passed", node=name, kind=kind)
        link = inputs.get(side)  # type: ignore[assignment]
        if not is_link(link):
            raise NotForeseen("unknown", node=name, kind=kind)
    raise NotForeseen("circle", node=found.id, kind=found.kind)


def _loaded(kind: str, inputs: dict[str, Any], what: str) -> Loaded | None:
    """Give what a loader loads, without a policy; None for a node that loads none. Raises NotForeseen."""
    if kind in CHECKPOINT_LOADERS:
        path = model_path("checkpoints", str(literal(inputs, "ckpt_name", kind)))
        return Loaded(path, "checkpoints", inputs.get("clip_dtype", "default") if what == TEXT else "default")
    if kind in VAE_LOADERS and what != TEXT:
        return Loaded(model_path("vae", str(literal(inputs, "vae_name", kind))), "vae")
    if kind in CLIP_LOADERS and what == TEXT:
        names = ["clip_name"] if CLIP_LOADERS[kind] == 1 else [f"clip_name{n + 1}" for n in range(CLIP_LOADERS[kind])]
        chosen = [str(literal(inputs, one, kind)) for one in names if inputs.get(one, NONE) != NONE]
        first, *more = [model_path("text_encoders", one) for one in chosen]
        dtype, family = inputs.get("weight_dtype", "default"), str(inputs.get("type", "stable_diffusion"))
        return Loaded(first, "text_encoders", dtype, more=tuple(more), family=family)
    return None
