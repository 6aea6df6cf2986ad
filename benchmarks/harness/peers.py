"""The contestants of ``offload_peers.py``: one class each, all with the same Flux module and the same file.

A contestant is made before the clock runs (imports, folders) and loaded while it runs. ``load`` returns what is called
with the model's inputs. Each is given the best configuration that we know it to have for weights that do not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo.flux import DoubleBlock, Flux, FluxConfig, SingleBlock, rotation, sinusoids

from .pack import load_pack

Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Job:
    """What is loaded, and where scratch files may go. `shared` is the same folder for all processes of one run."""

    checkpoint: Path
    config: FluxConfig
    weights: int  # bytes
    scratch: Path
    shared: Path
    device: torch.device

    def skeleton(self) -> Flux:
        """Make the module without memory for its parameters."""
        with torch.device("meta"):
            return Flux(self.config).to(torch.bfloat16).eval()


class Plain:
    """Everything loaded through safetensors, nothing between torch and its weights: the limit."""

    def __init__(self, job: Job) -> None:
        from safetensors.torch import load_file

        self.job, self.load_file = job, load_file

    def load(self) -> Model:
        module = self.job.skeleton()
        module.load_state_dict(self.load_file(self.job.checkpoint, device=str(self.job.device)), assign=True)
        return module


class Spillway:
    """Our engine. share: of the weights' bytes that may be resident."""

    def __init__(self, job: Job, share: float) -> None:
        load_pack()
        from spillway.ops.files.disk_map import DiskMap
        from spillway.ops.skip_init import skip_model_initialization
        from spillway.patcher.dynamic_model import DynamicModel
        from spillway.patcher.policy import Policy

        self.job, self.share = job, share
        self.parts = DiskMap, skip_model_initialization, DynamicModel, Policy

    def load(self) -> Model:
        DiskMap, skip_model_initialization, DynamicModel, Policy = self.parts
        with skip_model_initialization():
            module = Flux(self.job.config).to(torch.bfloat16).eval()
        self.model = DynamicModel(module, DiskMap(self.job.checkpoint), self.job.device)
        # Of its own count: bundles are aligned, so they take a little more than the file.
        self.model.set_policy(Policy(vram_bytes=int(self.model.total_bytes * self.share)))
        return self.model

    def facts(self) -> dict[str, Any]:
        """Return what the ledger says at the end."""
        return {"peak_resident": self.model.peak_resident_bytes, **self.model.ledger.as_dict()}


class Accelerate:
    """dispatch_model with what does not fit read from the safetensors file itself, so nothing is written to disk. On a
    card, what does not fit stays in RAM.

    Its own `infer_auto_device_map` splits, down to single layers. (`disk_offload` would first copy all weights to a
    folder.)
    """

    def __init__(self, job: Job, share: float) -> None:
        import accelerate
        import torch._dynamo  # noqa: F401 - its hooks import this at their first call, four seconds that are not the loader's
        from accelerate.utils import set_module_tensor_to_device
        from safetensors import safe_open

        self.job, self.share = job, share
        self.parts = accelerate, set_module_tensor_to_device, safe_open

    def load(self) -> Model:
        accelerate, set_tensor, safe_open = self.parts
        with accelerate.init_empty_weights():
            module = Flux(self.job.config).to(torch.bfloat16).eval()
        budget = int(self.job.weights * self.share)
        if self.job.device.type != "cpu":
            return self.on_card(module, budget)
        places = accelerate.infer_auto_device_map(module, {"cpu": budget}) if budget else {"": "disk"}
        index, path = {}, str(self.job.checkpoint)
        with safe_open(self.job.checkpoint, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                prefix = max((p for p in places if not p or name == p or name.startswith(p + ".")), key=len)
                if places[prefix] == "disk":
                    index[name] = {"safetensors_file": path, "weight_name": name, "dtype": "bfloat16"}
                else:
                    set_tensor(module, name, "cpu", value=file.get_tensor(name))
        return accelerate.dispatch_model(module, places, main_device="cpu", offload_index=index, force_hooks=True)

    def on_card(self, module: Flux, budget: int) -> Model:
        from safetensors.torch import load_file

        accelerate, _, _ = self.parts
        module.load_state_dict(load_file(self.job.checkpoint), assign=True)
        if not budget:
            return accelerate.cpu_offload(module, self.job.device)
        places = accelerate.infer_auto_device_map(module, {self.job.device.index: budget, "cpu": 1 << 50})
        return accelerate.dispatch_model(module, places, main_device=self.job.device)


class Diffusers:
    """apply_group_offloading, on a card with a stream.

    disk: 'none' (groups stay in RAM), 'new' (they are first written to a folder), 'kept' (the folder is there already).
    """

    def __init__(self, job: Job, disk: str, kind: str = "block_level") -> None:
        import torch._dynamo  # noqa: F401 - as for accelerate
        from diffusers.hooks import apply_group_offloading
        from safetensors.torch import load_file

        self.job, self.kind = job, kind
        self.parts = load_file, apply_group_offloading
        self.folder = {"none": None, "new": job.scratch / "groups", "kept": job.shared / f"groups-{kind}"}[disk]

    def prepare(self) -> None:
        """Write the groups, in a process of its own, before anything is measured."""
        self.load()

    def load(self) -> Model:
        load_file, apply_group_offloading = self.parts
        module = self.job.skeleton()
        module.load_state_dict(load_file(self.job.checkpoint), assign=True)
        streams = {} if self.job.device.type == "cpu" else {"use_stream": True, "record_stream": True}
        apply_group_offloading(
            module,
            onload_device=self.job.device,
            offload_device=torch.device("cpu"),
            offload_type=self.kind,
            num_blocks_per_group=1,
            offload_to_disk_path=None if self.folder is None else str(self.folder),
            **streams,
        )
        return module


class RamTorch:
    """OffloadModel, which wants the model diced by hand into a chain. disk: all weights in its scratch file."""

    def __init__(self, job: Job, share: float, disk: bool) -> None:
        from ramtorch import OffloadModel
        from safetensors.torch import load_file

        self.job, self.share, self.disk = job, share, disk
        self.parts = load_file, OffloadModel

    def load(self) -> Model:
        load_file, OffloadModel = self.parts
        module = self.job.skeleton()
        module.load_state_dict(load_file(self.job.checkpoint), assign=True)
        chunks = [Head(module), *map(Double, module.double_blocks), *map(Single, module.single_blocks), Tail(module)]
        model = OffloadModel(
            chunks,
            device=str(self.job.device),
            window=2,
            pin=round(self.share * len(chunks)),
            nvme=len(chunks) if self.disk else 0,
            nvme_path=str(self.job.scratch / "weights.bin") if self.disk else None,
        )
        return lambda *inputs: model(inputs)


class Mmgp:
    """mmgp's `offload.profile`. On a card, as for much RAM: all weights are page-locked, and 3 GB of them may stay."""

    def __init__(self, job: Job) -> None:
        from safetensors.torch import load_file

        scripts = str(Path(__file__).resolve().parents[1])
        sys.path.remove(scripts)  # or its libraries would take our gguf.py for the package of that name
        try:
            from mmgp import offload
        finally:
            sys.path.insert(0, scripts)
        self.job, self.parts = job, (load_file, offload)

    def load(self) -> Model:
        load_file, offload = self.parts
        module = self.job.skeleton()
        module.load_state_dict(load_file(self.job.checkpoint), assign=True)
        kinds = offload.profile_type
        kind = kinds.VerylowRAM_LowVRAM if self.job.device.type == "cpu" else kinds.HighRAM_LowVRAM
        offload.profile({"transformer": module}, kind)
        return module


# RamTorch's chain: each link takes what the one before returns.


class Head(torch.nn.Module):
    def __init__(self, flux: Flux) -> None:
        super().__init__()
        self.img_in, self.txt_in, self.time_in = flux.img_in, flux.txt_in, flux.time_in
        self.vector_in, self.guidance_in = flux.vector_in, flux.guidance_in
        self.config = flux.config

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, time: Tensor, pooled: Tensor, guidance: Tensor
    ) -> tuple[Tensor, ...]:
        vec = self.time_in(sinusoids(time, img.dtype)) + self.vector_in(pooled)
        vec = vec + self.guidance_in(sinusoids(guidance, img.dtype))
        rope = rotation(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        return self.img_in(img), self.txt_in(txt), vec, *rope


class Double(torch.nn.Module):
    def __init__(self, block: DoubleBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return *self.block(img, txt, vec, (cos, sin)), vec, cos, sin


class Single(torch.nn.Module):
    def __init__(self, block: SingleBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        x = self.block(torch.cat((txt, img), dim=1), vec, (cos, sin))
        return x[:, txt.shape[1] :], x[:, : txt.shape[1]], vec, cos, sin


class Tail(torch.nn.Module):
    def __init__(self, flux: Flux) -> None:
        super().__init__()
        self.final_layer = flux.final_layer

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.final_layer(img, vec)


# Name: class and arguments. The first is the reference.
CONTESTANTS: dict[str, tuple[type, dict[str, Any]]] = {
    "plain module (limit)": (Plain, {}),
    "Spillway 100 %": (Spillway, {"share": 1.0}),
    "Spillway 50 %": (Spillway, {"share": 0.5}),
    "Spillway 25 %": (Spillway, {"share": 0.25}),
    "Spillway 0 %": (Spillway, {"share": 0.0}),
    "accelerate 50 %": (Accelerate, {"share": 0.5}),
    "accelerate 25 %": (Accelerate, {"share": 0.25}),
    "accelerate 0 %": (Accelerate, {"share": 0.0}),
    "diffusers in RAM": (Diffusers, {"disk": "none"}),
    "diffusers disk, first run": (Diffusers, {"disk": "new"}),
    "diffusers disk, blocks": (Diffusers, {"disk": "kept"}),
    "diffusers disk, leaves": (Diffusers, {"disk": "kept", "kind": "leaf_level"}),
    "RamTorch in RAM": (RamTorch, {"share": 0.0, "disk": False}),
    "RamTorch disk, 25 % kept": (RamTorch, {"share": 0.25, "disk": True}),
    "RamTorch disk": (RamTorch, {"share": 0.0, "disk": True}),
    "mmgp": (Mmgp, {}),
}

# Those that say something on a card, where all have the file in RAM.
ON_CARD: dict[str, tuple[type, dict[str, Any]]] = {
    **{name: CONTESTANTS[name] for name in ("plain module (limit)", "Spillway 50 %", "Spillway 25 %", "Spillway 0 %")},
    **{name: CONTESTANTS[name] for name in ("accelerate 50 %", "accelerate 0 %")},
    "diffusers, blocks": (Diffusers, {"disk": "none"}),
    "diffusers, leaves": (Diffusers, {"disk": "none", "kind": "leaf_level"}),
    "RamTorch, 25 % kept": (RamTorch, {"share": 0.25, "disk": False}),
    "RamTorch": (RamTorch, {"share": 0.0, "disk": False}),
    "mmgp": (Mmgp, {}),
}
