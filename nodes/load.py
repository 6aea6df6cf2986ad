"""Loader nodes: models whose weights stay in their file until they are used."""

from __future__ import annotations

from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..patcher.comfy_load import WEIGHT_DTYPES, load_checkpoint, load_clip, load_diffusion_model, load_vae
from .types import CATEGORY, policy_input

NONE = "none"


class SpillwayLoadDiffusionModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoadDiffusionModel",
            display_name="Load Diffusion Model (Spillway)",
            category=CATEGORY,
            description="Loads a diffusion model in no time and almost no memory: its weights are brought as they are "
            "used, and give way when memory is wanted.",
            search_aliases=["load unet", "unet loader", "load diffusion model", "low vram", "offload", "dynamic vram"],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file in models/diffusion_models. Only safetensors files can be loaded lazily.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="What the weights are kept in. 'default' follows the file and the device.",
                ),
                policy_input(),
            ],
            outputs=[io.Model.Output(tooltip="A MODEL for any sampler; LoRA and hook nodes work on it.")],
        )

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str, policy: Any = None) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        return io.NodeOutput(load_diffusion_model(path, weight_dtype, policy))


class SpillwayLoadCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoadCheckpoint",
            display_name="Load Checkpoint (Spillway)",
            category=CATEGORY,
            description="Loads a checkpoint; model, text encoder, VAE and CLIP vision are all brought as they are used.",
            search_aliases=["load checkpoint", "checkpoint loader", "ckpt", "low vram", "offload"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list("checkpoints"),
                    tooltip="A file in models/checkpoints. Only safetensors files can be loaded lazily.",
                ),
                policy_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="The text encoder, where the file has one."),
                io.Vae.Output(tooltip="The VAE, where the file has one."),
                io.ClipVision.Output(tooltip="The CLIP vision model, where the file has one (unCLIP, SVD)."),
            ],
        )

    @classmethod
    def execute(cls, ckpt_name: str, policy: Any = None) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("checkpoints", ckpt_name)
        return io.NodeOutput(*load_checkpoint(path, policy, folder_paths.get_folder_paths("embeddings")))


class SpillwayLoadCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = folder_paths.get_filename_list("text_encoders")
        return io.Schema(
            node_id="SpillwayLoadCLIP",
            display_name="Load CLIP (Spillway)",
            category=CATEGORY,
            description="Loads one to three text encoder files as one CLIP, brought as it is used.",
            search_aliases=["load clip", "clip loader", "dual clip loader", "triple clip loader", "text encoder", "t5"],
            inputs=[
                io.Combo.Input("clip_name1", options=files, tooltip="A file in models/text_encoders."),
                io.Combo.Input(
                    "type",
                    options=[kind.name.lower() for kind in comfy.sd.CLIPType],
                    default="stable_diffusion",
                    tooltip="The kind of model that the text encoder is for.",
                ),
                io.Combo.Input(
                    "clip_name2", options=[NONE, *files], default=NONE, optional=True, tooltip="A second file, if needed."
                ),
                io.Combo.Input(
                    "clip_name3", options=[NONE, *files], default=NONE, optional=True, tooltip="A third file, if needed."
                ),
                policy_input(),
            ],
            outputs=[io.Clip.Output(tooltip="A CLIP for the text encode nodes.")],
        )

    @classmethod
    def execute(
        cls, clip_name1: str, type: str, clip_name2: str = NONE, clip_name3: str = NONE, policy: Any = None
    ) -> io.NodeOutput:
        names = [name for name in (clip_name1, clip_name2, clip_name3) if name != NONE]
        paths = [folder_paths.get_full_path_or_raise("text_encoders", name) for name in names]
        return io.NodeOutput(load_clip(paths, type, policy, folder_paths.get_folder_paths("embeddings")))


class SpillwayLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoadVAE",
            display_name="Load VAE (Spillway)",
            category=CATEGORY,
            description="Loads a VAE whose weights are brought as they are used.",
            search_aliases=["load vae", "vae loader", "low vram", "offload"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=folder_paths.get_filename_list("vae"),
                    tooltip="A file in models/vae. Only safetensors files can be loaded lazily.",
                ),
                policy_input(),
            ],
            outputs=[io.Vae.Output(tooltip="A VAE for the encode and decode nodes.")],
        )

    @classmethod
    def execute(cls, vae_name: str, policy: Any = None) -> io.NodeOutput:
        return io.NodeOutput(load_vae(folder_paths.get_full_path_or_raise("vae", vae_name), policy))
