"""Prompts and requests of which one or two inputs make no sense."""

import json

from kit.comfyui.running_server import node

from .invariants import OURS

NAN, INF = float("nan"), float("inf")
WRONG = (
    *(None, True, False, 0, -1, 1, 0.5, -1e308, NAN, INF, -INF, 2**31, 2**63, -(2**70), 10**400),
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "x",
        "nan",
        "-1",
        "none",
        "auto",
        "con",
        "a\nb",
        "a\0b",
        "ünï/模型",
        "\ud800",
        "x" * 5000,
    ),
    *("../../../escape", "/etc/passwd", "..\\..\\x", "%2e%2e/x", "ours/../../x", "embedding:nothing", "%date:yyyy%"),
    *({}, {"a": 1}, {"samples": 1}, {"samples": None}, {"__value__": [1, 2]}, {"__value__": []}, {"__type__": "MODEL"}),
)
GROWING = ("loras",)
WRONG_WIRES = (["load", 0], ["load", 1], ["load", 2], ["latent", 0], ["image", 0], ["policy", 1], ["load", 3])
WIRES = {
    "MODEL": ["load", 0],
    "CLIP": ["load", 1],
    "VAE": ["load", 2],
    "CLIP_VISION": ["vision", 0],
    "LATENT": ["latent", 0],
    "IMAGE": ["image", 0],
    "SPILLWAY_POLICY": ["policy", 1],
    "*": ["image", 0],
}


def our_nodes(server):
    """{id: its inputs, as (name, type, options, optional)} of every node of ours."""
    found = {}
    for kind, info in server.get("object_info").items():
        if kind.startswith(OURS):
            found[kind] = [
                (name, "COMBO" if isinstance(entry[0], list) else entry[0], (*entry, {})[1], part == "optional")
                for part in ("required", "optional")
                for name, entry in info["input"].get(part, {}).items()
            ]
    return found


def base_prompt():
    """What every prompt may take its wires from. Nothing of it runs unless it is used."""
    policy = {"vram_gb": -1.0, "headroom_gb": -1.0, "pinned_gb": -1.0, "keep": "auto", "priority": 0}
    flux = {"unet_name": "flux.safetensors", "weight_dtype": "default"}
    return {
        "unet": node("SpillwayLoadDiffusionModel", **flux),
        "second": node("SpillwayLoadDiffusionModel", **{**flux, "unet_name": "second.safetensors"}),
        "clip": node("SpillwayLoadCLIP", clip_name1="clip.safetensors", type="stable_diffusion"),
        "vae": node("SpillwayLoadVAE", vae_name="ae.safetensors"),
        "policy": node("SpillwayPolicy", **policy),
        "latent": node("EmptySD3LatentImage", width=32, height=32, batch_size=1),
        "image": node("EmptyImage", width=32, height=32, batch_size=1, color=7),
    }


class Fuzz:
    """Makes prompts. Every input of every node comes up in turn."""

    def __init__(self, server, rng):
        self.rng, self.models = rng, server.base / "models"
        self.nodes = our_nodes(server)
        self.turn = [(kind, entry) for kind, inputs in self.nodes.items() for entry in inputs]
        rng.shuffle(self.turn)
        self.count = 0

    def prompt(self):
        """(prompt, kind of the node, {input: value} of the inputs that make no sense)."""
        kind, (name, *_) = self.turn[self.count % len(self.turn)]
        self.count += 1
        prompt = base_prompt()
        # Device Control needs one of its optional inputs.
        chosen = [entry for entry in self.nodes[kind] if not entry[3] or entry[0] == "model" or self.rng.random() < 0.5]
        inputs = {}
        for entry in chosen:
            inputs[entry[0]] = self.right(entry, inputs)
        names = [name]
        if self.rng.random() < 0.2:
            names.append(self.rng.choice(self.nodes[kind])[0])
        given = {wrong: self.spoil(prompt, inputs, wrong, number) for number, wrong in enumerate(dict.fromkeys(names))}
        prompt["fuzzed"] = node(kind, **inputs)
        # Of a node without an output node behind it nothing runs.
        prompt["report"] = node("SpillwayMemoryReport", value=["fuzzed", 0])
        return self.with_loaders(prompt), kind, given

    def with_loaders(self, prompt):
        """Give the wires of `load` to the loaders that stand for it."""
        parts = {("load", 0): ["unet", 0], ("load", 1): ["clip", 0], ("load", 2): ["vae", 0], ("load", 3): ["image", 0]}
        for one in prompt.values():
            for name, value in one["inputs"].items():
                if isinstance(value, list) and len(value) == 2 and tuple(value) in parts:
                    one["inputs"][name] = parts[tuple(value)]
        return prompt

    def spoil(self, prompt, inputs, name, number):
        """Give an input a value by a wire of any type, which ComfyUI does not look at, or as a literal, or none.

        Returns the value.
        """
        value = None
        # The model itself is a right value for the other model, and has no difference to it.
        wires = [wire for wire in WRONG_WIRES if name != "base" or wire != ["load", 0]]
        ways = {"any wire": 5, "any wire of a wire": 2, "literal": 3, "wrong wire": 1, "missing": 1}
        (way,) = self.rng.choices(list(ways), list(ways.values()))
        if way == "missing":
            inputs.pop(name, None)
        elif way == "literal":
            inputs[name] = value = self.rng.choice(WRONG)
        elif way == "wrong wire":
            # ComfyUI does not check what an input that grows has. An output that is not there ends its thread, and a
            # node's own output is an error of another node.
            checked = [] if name in GROWING else [["image", 7], ["fuzzed", 0]]
            inputs[name] = self.rng.choice([*wires, ["nothing", 0], *checked, ["image", -1]])
        else:
            value = self.rng.choice(WRONG if way == "any wire" else wires)
            any_name = f"any {number}"
            values = {"value": value, "headroom_gb": -1.0, "never_evict": False, "disk_gb": -1.0}
            prompt[any_name] = node("SpillwayCachePolicy", **values)
            inputs[name] = [any_name, 0]
        return value

    def right(self, entry, inputs):
        """A value that the node takes beside the inputs before it."""
        name, kind, options, _ = entry
        if name == "base":  # a model that is the same has no difference to make a LoRA of
            return ["second", 0]
        if kind in WIRES:
            return WIRES[kind]
        if name == "address":  # of a model that is here already, so that nothing is fetched
            return (self.models / "diffusion_models" / "flux.safetensors").as_uri()
        if name == "folder" and "address" in inputs:
            return "diffusion_models"
        if name == "type":  # of the text encoder that is here: for another it is an error of its own
            return "stable_diffusion"
        if name == "mode" and "weighted sum" in options.get("options", []):
            return "weighted sum"  # the other needs a third model
        if kind == "COMBO":
            # A move needs another device than there is.
            choices = [one for one in options.get("options", []) if "large" not in str(one) and "move" not in str(one)]
            return self.rng.choice(choices or ["a file of an empty folder"])
        if kind == "BOOLEAN":
            return self.rng.random() < 0.5
        if kind == "STRING":
            return "ours/fuzzed" if name == "filename_prefix" else "a text"
        default, least = options.get("default", 0), options.get("min", 0)
        return self.rng.choice([default, least]) if name != "rank" else 2


# --- requests ---------------------------------------------------------------------------------------------------------

# By path, the names that its body may have.
NAMES = {
    "spillway/free": ("cache", "models", "pins", "bytes", "x"),
    "spillway/model": ("model", "action", "value", "x"),
    "spillway/look": ("client_id", "looks", "x"),
    "spillway/forecast": ("prompt", "x"),
    "spillway/compare": ("prompt", "comfyui", "client_id", "x"),
}
PROMPTS = ("prompt", "comfyui")
PATHS = (*NAMES, "spillway/memory", "spillway/", "spillway/free/", "spillway/memory?x=%00", "spillway/../free")
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")
HEADERS = (
    {},
    {"Content_Type": "text/plain"},
    {"Content_Type": "application/json; charset=utf-16"},
    {"Content_Type": "application/json; charset=nonsense"},
    {"Content_Type": "\x01"},
    {"Origin": "null"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Content_Encoding": "gzip"},
)
BODIES = (b"", b"{", b"null", b"[]", b"[" * 3000, b"\xff\xfe\0", b'{"cache": true}', b'{"models": true, "pins": true}')


def wrong_prompt(rng):
    """A prompt that nobody has validated: a sampler and its loaders, of which some are not what they should be."""
    prompt = base_prompt()
    wires = {"model": ["unet", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}
    sampler = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    prompt["text"] = node("CLIPTextEncode", clip=["clip", 0], text="a text")
    prompt["sampled"] = node("KSampler", **wires, **sampler)
    prompt["decoded"] = node("VAEDecode", samples=["sampled", 0], vae=["vae", 0])
    prompt["shown"] = node("PreviewImage", images=["decoded", 0])
    places = [*prompt, "not there"]
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(list(prompt))
        found = prompt[name]
        way = rng.choice(("input", "input", "wire", "class", "node", "inputs", "gone"))
        if way == "gone":
            del prompt[name]
        elif way == "node" or not isinstance(found, dict) or not isinstance(found.get("inputs"), dict):
            prompt[name] = rng.choice(WRONG)
        elif way == "class":
            found["class_type"] = rng.choice((*WRONG, "SpillwayPolicy", "KSampler", "LoadImage"))
        elif way == "inputs":
            found["inputs"] = rng.choice(WRONG)
        else:
            wire = [rng.choice(places), rng.choice((0, 0, 1, 7, -1, "0", None))]
            found["inputs"][rng.choice([*found["inputs"], "x"])] = wire if way == "wire" else rng.choice(WRONG)
    return prompt


def request(rng):
    """(path, body, method, headers) of a request to a route of ours, more or less wrong."""
    path, method = rng.choice(PATHS), rng.choice((*METHODS, "POST", "POST", "POST"))
    body = rng.choice(BODIES)
    if rng.random() < 0.5:
        names = NAMES.get(path, NAMES["spillway/free"])
        keys = rng.sample(names, rng.randint(1, len(names)))
        values = (True, 1, 2, "keep", "limit", "free_vram", "drop_ram", *WRONG)
        given = {key: rng.choice(values) for key in keys}
        given |= {key: wrong_prompt(rng) for key in keys if key in PROMPTS and rng.random() < 0.8}
        body = json.dumps(given).encode()
    return path, body if method not in ("GET", "HEAD", "OPTIONS") else None, method, rng.choice(HEADERS)
