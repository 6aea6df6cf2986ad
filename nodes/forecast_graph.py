"""Walks back from the samplers of a prompt to the loaders of their models, and says what it met on the way."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from comfy_execution.graph_utils import is_link

from ..ops.errors import SpillwayError
from ..patcher.comfyui.forecast.sampling import Latent
from ..patcher.comfyui.forecast.sketch import Loaded
from ..patcher.policy import Policy
from .forecast_latent import latent_of
from .graph_policy import POLICY_NODE, RULES_NODE, policy_of
from .load import NONE, model_path
from .lora import SLOTS

Node = dict[str, Any]
MOST_STEPS = 200  # of one walk: a graph may go round in a circle

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
ONE_LORA = ("SpillwayLoraLoader", "SpillwayLoraLoaderModelOnly", "LoraLoader", "LoraLoaderModelOnly")
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


class NotForeseen(SpillwayError, ValueError):
    """Says why nothing can be foreseen for a sampler. code: what to say of it; values: for its words."""

    def __init__(self, code: str, **values: str) -> None:
        super().__init__(code)
        self.code, self.values = code, values


@dataclass
class Sampling:
    """A sampler. loader, latent_node: ids of the nodes that say what it samples. notes: (code, values) to be said."""

    id: str
    kind: str
    guided: bool = True
    loader: str = ""
    ours: bool = True
    loaded: Loaded = field(default_factory=lambda: Loaded(""))
    latent: Latent = field(default_factory=lambda: Latent(1024, 1024))
    latent_node: str | None = None
    quantised_by: str | None = None
    notes: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def note(self, code: str, **values: str) -> None:
        if (code, values) not in self.notes:
            self.notes.append((code, values))


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
        guider = _node(prompt, inputs["guider"])
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
        name, node = str(link[0]), _node(prompt, link)
        kind, inputs = node["class_type"], node["inputs"]
        if kind in OURS or kind in THEIRS:
            widget, folder = OURS.get(kind) or THEIRS[kind]
            path = model_path(folder, str(_literal(inputs, widget, kind)))
            own = policy if policy is not None else _policy(prompt, inputs.get("policy"), found)
            dtype = inputs.get("weight_dtype", "default") if kind in OURS or folder == DIFFUSION else "default"
            found.loader, found.ours = name, kind in OURS or (found.ours and bool(quantised))
            found.loaded = Loaded(path, folder, dtype, own, tuple(reversed(loras)))
            found.loaded = replace(found.loaded, **quantised)
            if kind in THEIRS and not quantised:
                found.ours = False
                found.note("theirs", node=name, kind=kind)
            return
        if kind in ONE_LORA:
            loras.append((str(_literal(inputs, "lora_name", kind)), float(_literal(inputs, "strength_model", kind))))
        elif kind == "SpillwayLoraStack":
            slots = [(inputs.get(f"lora_{n}", NONE), inputs.get(f"strength_{n}", 1.0)) for n in range(1, SLOTS + 1)]
            loras += [(str(lora), float(strength)) for lora, strength in reversed(slots) if lora != NONE and strength]
        elif kind == "SpillwayGrowingLoraStack":
            chosen = [_node(prompt, one)["inputs"] for key, one in inputs.items() if "lora" in key and is_link(one)]
            loras += [(str(one["lora_name"]), float(one["strength_model"])) for one in reversed(chosen)]
        elif kind == POLICY_NODE:
            policy = policy if policy is not None else _made(prompt, name, found)
        elif kind == "SpillwayQuantiseModel":
            parts = str(inputs.get("leave_out", "")).replace("\n", ",").split(",")
            quantised = {"weight_dtype": inputs.get("weight_dtype", "auto"), "leave_out": tuple(filter(None, parts))}
            found.quantised_by = found.quantised_by or name
            policy = policy if policy is not None else _policy(prompt, inputs.get("policy"), found)
        elif kind not in THROUGH:
            found.note("passed", node=name, kind=kind)
        link = inputs.get("model", inputs.get("model1"))  # type: ignore[assignment]
        if not is_link(link):
            raise NotForeseen("unknown", node=name, kind=kind)
    raise NotForeseen("circle", node=found.id, kind=found.kind)


def lora_paths(loaded: Loaded) -> Loaded:
    """Give what is loaded with paths in the place of LoRAs' names. Raises FileNotFoundError."""
    return replace(loaded, loras=tuple((model_path("loras", name), strength) for name, strength in loaded.loras))


def _node(prompt: dict[str, Node], link: list[Any]) -> Node:
    try:
        return prompt[str(link[0])]
    except KeyError:
        raise NotForeseen("missing", node=str(link[0]), kind="") from None


def _literal(inputs: dict[str, Any], name: str, kind: str) -> Any:
    value = inputs.get(name)
    if value is None or is_link(value):
        raise NotForeseen("wired", widget=name, kind=kind)
    return value


def _policy(prompt: dict[str, Node], link: Any, found: Sampling) -> Policy | None:
    return _made(prompt, str(link[0]), found) if is_link(link) else None


def _made(prompt: dict[str, Node], name: str, found: Sampling) -> Policy | None:
    kind = prompt.get(name, {}).get("class_type")
    try:
        if kind not in (POLICY_NODE, RULES_NODE):
            raise ValueError(f"a node of another kind ({kind})")
        return policy_of(prompt, name)[0]
    except (KeyError, TypeError, ValueError):
        found.note("policy", node=name, kind=str(kind))
        return None
