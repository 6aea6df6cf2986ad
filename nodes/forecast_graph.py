"""Walks back from the samplers of a prompt to the loaders of their models, and says what it met on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from comfy_execution.graph_utils import is_link

from ..patcher.comfyui.forecast.sampling import Latent
from ..patcher.comfyui.forecast.sketch import Loaded
from ..patcher.policy import Policy
from .forecast_latent import latent_of
from .forecast_walk import (
    LORAS,
    MOST_STEPS,
    Found,
    Node,
    NotForeseen,
    literal,
    loras_of,
    made_policy,
    node_of,
    wired_policy,
)
from .graph_policy import POLICY_NODE
from .load import model_path

DIFFUSION, CHECKPOINTS = "diffusion_models", "checkpoints"
# By the class of a loader: the widget that names the file, and the folder that it lies in.
OURS = {
    "SpillwayLoadDiffusionModel": ("unet_name", DIFFUSION),
    "SpillwayLoadCheckpoint": ("ckpt_name", CHECKPOINTS),
}
THEIRS = {
    "UNETLoader": ("unet_name", DIFFUSION),
    "UnetLoaderGGUF": ("unet_name", DIFFUSION),
    "CheckpointLoaderSimple": ("ckpt_name", CHECKPOINTS),
    "unCLIPCheckpointLoader": ("ckpt_name", CHECKPOINTS),
}
# Nodes through which a model goes as large as it was.
THROUGH = (
    "SpillwayMakeDynamic",
    "SpillwaySeamlessTiling",
    "SpillwayLazyTorchCompile",
    "ModelSamplingFlux",
    "ModelSamplingSD3",
    "ModelSamplingAuraFlow",
    "ModelSamplingDiscrete",
    "ModelSamplingContinuousEDM",
    "CFGNorm",
    "RescaleCFG",
    "SkipLayerGuidanceDiT",
)


@dataclass
class Sampling(Found):
    """A sampler. latent_node, quantised_by: ids of the nodes that say how many pictures, and in which format."""

    guided: bool = True
    latent: Latent = field(default_factory=lambda: Latent(1024, 1024))
    latent_node: str | None = None
    quantised_by: str | None = None


def samplers(prompt: dict[str, Node]) -> list[str]:
    """List the ids of the nodes that sample: they have a latent, and a model or what guides one."""
    found = []
    for name, node in prompt.items():
        inputs = node["inputs"]
        takes_model = is_link(inputs.get("model")) or is_link(inputs.get("guider"))
        if takes_model and is_link(inputs.get("latent_image")):
            found.append(name)
    return found


def walk(prompt: dict[str, Node], name: str, of_graph: Policy | None) -> Sampling:
    """Find what a sampler samples. of_graph: the policy for models that have none. Raises NotForeseen."""
    node = prompt[name]
    found = Sampling(name, node["class_type"])
    inputs = node["inputs"]
    if is_link(inputs.get("guider")):
        guider = node_of(prompt, inputs["guider"])
        found.guided = guider["class_type"] != "BasicGuider" and guider["inputs"].get("cfg") != 1.0
        link = guider["inputs"].get("model", guider["inputs"].get("model1"))
    else:
        found.guided = inputs.get("cfg") != 1.0
        link = inputs["model"]
    if not is_link(link):
        raise NotForeseen("unknown", node=found.id, kind=found.kind)
    _find_model(prompt, link, found)
    found.latent, found.latent_node = latent_of(prompt, inputs["latent_image"], found.note)
    own = found.loaded.policy
    found.loaded = replace(found.loaded, policy=own if own is not None else of_graph)
    return found


def _find_model(prompt: dict[str, Node], link: list[Any], found: Sampling) -> None:
    policy: Policy | None = None
    loras: list[tuple[str, float]] = []
    quantised: dict[str, Any] = {}
    for _ in range(MOST_STEPS):
        name, node = str(link[0]), node_of(prompt, link)
        kind, inputs = node["class_type"], node["inputs"]
        if kind in OURS or kind in THEIRS:
            widget, folder = OURS.get(kind) or THEIRS[kind]
            path = model_path(folder, str(literal(inputs, widget, kind)))
            own = policy if policy is not None else wired_policy(prompt, inputs.get("policy"), found)
            dtype = inputs.get("weight_dtype", "default") if kind in OURS or folder == DIFFUSION else "default"
            found.loader, found.ours = name, kind in OURS or (found.ours and bool(quantised))
            found.loaded = Loaded(path, folder, dtype, own, tuple(reversed(loras)))
            found.loaded = replace(found.loaded, **quantised)
            if kind in THEIRS and not quantised:
                found.ours = False
                found.note("theirs", node=name, kind=kind)
            return
        if kind in LORAS:
            loras += loras_of(prompt, node, "model")
        elif kind == POLICY_NODE:
            policy = policy if policy is not None else made_policy(prompt, name, found)
        elif kind == "SpillwayQuantiseModel":
            parts = str(inputs.get("leave_out", "")).replace("\n", ",").split(",")
            quantised = {"weight_dtype": inputs.get("weight_dtype", "auto"), "leave_out": tuple(filter(None, parts))}
            found.quantised_by = found.quantised_by or name
            policy = policy if policy is not None else wired_policy(prompt, inputs.get("policy"), found)
        elif kind not in THROUGH:
            found.note("passed", node=name, kind=kind)
        link = inputs.get("model", inputs.get("model1"))  # type: ignore[assignment]
        if not is_link(link):
            raise NotForeseen("unknown", node=name, kind=kind)
    raise NotForeseen("circle", node=found.id, kind=found.kind)
