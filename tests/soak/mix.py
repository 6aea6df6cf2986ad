"""Random graphs of the pack's nodes and ComfyUI's."""

from kit.comfyui.running_server import node

TEXTS = ("a red house by the sea", "embedding:style in the evening", "a cat", "")
DTYPES = ("default", "default", "fp8_e4m3fn", "int8")
POLICIES = (
    {"vram_gb": -1.0},
    {"vram_gb": 0.0},
    {"vram_gb": 0.001, "keep": "free after use"},
    {"vram_gb": 0.0005, "pinned_gb": 0.001, "priority": 5},
    {"keep": "always", "int8_lora": "side branch"},
    {"headroom_gb": 3.0, "int8_lora": "merge"},
)
ACTIONS = ("load now", "unload to RAM", "drop RAM and pins too")
SAVE_DTYPES = ("as loaded", "bf16", "fp16", "fp32", "fp8_e4m3fn scaled", "int8_tensorwise")


def policy(rng, **more):
    values = {"vram_gb": -1.0, "headroom_gb": -1.0, "pinned_gb": -1.0, "keep": "auto", "priority": 0}
    return node("SpillwayPolicy", **{**values, **rng.choice(POLICIES), **more})


class Graph:
    """A prompt in the making. Each wire (model, clip, ...) is the last that a node gave."""

    def __init__(self, rng, prefix, one_by_one=False):
        self.rng, self.prefix, self.one_by_one = rng, prefix, one_by_one
        self.prompt = {}

    def add(self, name, kind, **inputs):
        self.prompt[name] = node(kind, **inputs)
        return name

    def maybe(self, share):
        return self.rng.random() < share

    # -- models

    def load(self):
        """A Flux by one of several ways, or a checkpoint. Sets the wires."""
        self.add("policy", **_as_arguments(policy(self.rng)))
        given = {"policy": ["policy", 1]} if self.maybe(0.6) else {}
        self.add("load clip", "SpillwayLoadCLIP", clip_name1="clip.safetensors", type="stable_diffusion", **given)
        self.add("load vae", "SpillwayLoadVAE", vae_name="ae.safetensors", **given)
        self.model, self.clip, self.vae = ["load", 0], ["load clip", 0], ["load vae", 0]
        self.latent = "EmptySD3LatentImage"
        way = self.rng.choice(("ours",) * 4 + ("merge",) * 2 + ("theirs",) * 2 + ("checkpoint",))
        if way == "ours":
            self.load_flux("load", self.rng.choice(DTYPES), **given)
        elif way == "merge":
            self.load_flux("load one", "default", **given)
            self.add("load two", "SpillwayLoadDiffusionModel", unet_name="second.safetensors", weight_dtype="default")
            ratios = {"early": -1.0, "middle": self.rng.choice((-1.0, 0.0)), "late": -1.0, "other": 1.0}
            self.add(
                "load",
                "SpillwayMergeModels",
                model1=["load one", 0],
                model2=["load two", 0],
                mode="weighted sum",
                ratio=self.rng.choice((0.25, 0.5)),
                ratio3=0.0,
                **ratios,
            )
        elif way == "theirs":
            self.add("classic", "UNETLoader", unet_name="second.safetensors", weight_dtype="default")
            self.add("load", "SpillwayMakeDynamic", model=["classic", 0], **given)
        else:
            self.add("load", "SpillwayLoadCheckpoint", ckpt_name="sd15.safetensors", **given)
            self.clip, self.vae, self.latent = ["load", 1], ["load", 2], "EmptyLatentImage"
        self.is_flux = way != "checkpoint"

    def load_flux(self, name, weight_dtype, **given):
        self.add(name, "SpillwayLoadDiffusionModel", unet_name="flux.safetensors", weight_dtype=weight_dtype, **given)

    def change(self):
        """LoRAs, policies and device control on the model, in any order."""
        changes = [self.with_policy, self.with_device_control, self.with_cache_policy]
        if self.is_flux:
            changes += [self.with_lora, self.with_lora, self.with_lora_stack]
        for change in self.rng.sample(changes, self.rng.randint(0, 3)):
            change()

    def with_lora(self):
        name, strength = self.rng.choice(("detail", "light")), self.rng.choice((1.0, -0.5))
        values = {"model": self.model, "lora_name": f"{name}.safetensors", "strength_model": strength}
        if f"lora {name}" in self.prompt:
            return
        if self.maybe(0.5):
            self.add(f"lora {name}", "SpillwayLoraLoaderModelOnly", **values)
        else:
            self.add(f"lora {name}", "SpillwayLoraLoader", strength_clip=1.0, **values)
        self.model = [f"lora {name}", 0]

    def with_lora_stack(self):
        values = {f"lora_{number}": "none" for number in range(1, 7)}
        values |= {f"strength_{number}": 1.0 for number in range(1, 7)}
        values |= {"lora_1": "detail.safetensors", "lora_3": "light.safetensors", "strength_3": 0.5}
        self.add("stack", "SpillwayLoraStack", model=self.model, **values)
        self.model = ["stack", 0]

    def with_policy(self):
        self.add("set policy", **_as_arguments(policy(self.rng, model=self.model)))
        self.model = ["set policy", 0]

    def with_device_control(self):
        action = self.rng.choice(ACTIONS)
        self.add("control", "SpillwayDeviceControl", action=action, device="as it is", model=self.model)
        self.model = ["control", 0]

    def with_cache_policy(self):
        values = {"headroom_gb": self.rng.choice((-1.0, 0.5)), "never_evict": self.maybe(0.3), "disk_gb": -1.0}
        self.add("cache policy", "SpillwayCachePolicy", value=self.model, **values)
        self.model = ["cache policy", 0]

    # -- results

    def sample(self, steps=None):
        self.add("positive", "CLIPTextEncode", clip=self.clip, text=self.rng.choice(TEXTS))
        self.add("negative", "CLIPTextEncode", clip=self.clip, text="")
        size = self.rng.choice((32, 64))
        self.add(
            "empty",
            self.latent,
            width=size,
            height=size,
            batch_size=1 if self.one_by_one else self.rng.choice((1, 1, 2)),
        )
        self.add(
            "sampled",
            "KSampler",
            model=self.model,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=self.rng.randint(0, 3),
            steps=steps or self.rng.randint(1, 3),
            cfg=1.0 if self.is_flux or self.one_by_one else 4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )
        self.add("latent", "SaveLatent", samples=["sampled", 0], filename_prefix=f"{self.prefix}/latent")

    def decode(self):
        if self.maybe(0.5):
            self.add("decoded", "SpillwayVAEDecode", samples=["sampled", 0], vae=self.vae, tile_size=512)
        else:
            self.add("decoded", "VAEDecode", samples=["sampled", 0], vae=self.vae)
        self.add("image", "SaveImage", images=["decoded", 0], filename_prefix=f"{self.prefix}/image")
        if self.maybe(0.3):
            self.add("encoded", "SpillwayVAEEncode", pixels=["decoded", 0], vae=self.vae, tile_size=512)
            self.add("latent again", "SaveLatent", samples=["encoded", 0], filename_prefix=f"{self.prefix}/again")

    def save(self):
        """One prefix for both servers: their numbers are counted up side by side."""
        values = {"model": self.model, "filename_prefix": "ours/model", "dtype": self.rng.choice(SAVE_DTYPES)}
        if self.is_flux and self.maybe(0.2):
            self.with_lora()  # two models that are the same have no difference
            self.load_flux("base", "default")
            values |= {"model": self.model, "dtype": "fp16"}
            self.add("save", "SpillwaySaveLora", base=["base", 0], rank=2, **values)
        elif not self.is_flux and self.maybe(0.3):
            self.add("save", "SpillwaySaveCheckpoint", clip=self.clip, vae=self.vae, **values)
        else:
            self.add("save", "SpillwaySaveDiffusionModel", **values)

    def report(self):
        self.add("report", "SpillwayMemoryReport", value=self.model)
        self.add("probe", "SpillwayProbeModel", file="diffusion_models/flux.safetensors")


def random_graph(rng, prefix, *, save=None, steps=None, one_by_one=False):
    """A prompt. prefix: of what ComfyUI's own nodes save, which replace each other's files where two servers share
    one. save: whether it saves a model. one_by_one: one image and one condition, as ComfyUI computes several at once
    where there is memory for that, with other bits than one after the other.
    """
    graph = Graph(rng, prefix, one_by_one)
    graph.load()
    graph.change()
    save = graph.maybe(0.35) if save is None else save
    if not save or graph.maybe(0.5):
        graph.sample(steps)
        if graph.maybe(0.5):
            graph.decode()
    if save:
        graph.save()
    if graph.maybe(0.3):
        graph.report()
    return graph.prompt


def known_good(prefix, number):
    """A prompt that must succeed after every disturbance. number: makes it a new one, of which something must run."""
    policy = {"vram_gb": 0.001, "headroom_gb": -1.0, "pinned_gb": -1.0, "keep": "auto", "priority": 0}
    return {
        "policy": node("SpillwayPolicy", **policy),
        "load": node(
            "SpillwayLoadDiffusionModel", unet_name="flux.safetensors", weight_dtype="default", policy=["policy", 1]
        ),
        "clip": node("SpillwayLoadCLIP", clip_name1="clip.safetensors", type="stable_diffusion"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="a known good prompt"),
        "empty": node("EmptySD3LatentImage", width=32, height=32, batch_size=1),
        "sampled": node(
            "KSampler",
            model=["load", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            seed=number % 2,
            steps=1,
            cfg=1.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "latent": node("SaveLatent", samples=["sampled", 0], filename_prefix=f"{prefix}/known"),
        "image": node("EmptyImage", width=8, height=8, batch_size=1, color=number % (1 << 24)),
        "report": node("SpillwayMemoryReport", value=["image", 0]),
    }


def _as_arguments(made):
    return {"kind": made["class_type"], **made["inputs"]}
