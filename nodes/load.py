"""Loads models whose weights stay in their file until they are used, and takes over those of other loaders."""

from __future__ import annotations

import os
from typing import Any

import comfy.sd
import folder_paths
from comfy_api.latest import io, ui

from ..ops.files.coming_file import coming_file
from ..ops.files.file_state import file_state
from ..ops.files.lost_pages import times_lost
from ..ops.gguf.header import is_gguf
from ..ops.parts.folder import PIPELINE, may_be_model
from ..ops.parts.index import files_of, is_index, model_of, part_of
from ..patcher.comfyui.loading.adopt import dynamic_clip, dynamic_model, dynamic_vae
from ..patcher.comfyui.loading.load import (
    CHECKPOINT_DTYPES,
    TEXT_DTYPES,
    WEIGHT_DTYPES,
    load_checkpoint,
    load_clip,
    load_diffusion_model,
    load_vae,
)
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice, policy_input

NONE = "none"


def model_path(folder: str, name: str) -> str:
    """Return the path of a file, or of a model's folder, in one of ComfyUI's folders, or in that of diffusers models.

    Raises FileNotFoundError with all places looked in.
    """
    try:
        return folder_paths.get_full_path_or_raise(folder, name)
    except FileNotFoundError:
        found = _coming(folder, name) or _folder(folder, name)
        if found is not None:
            return found
        places = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(
            f"There is no file '{name}' in {places}. Put it there, or press R to bring the lists up to date and choose "
            "another."
        ) from None


def _coming(folder: str, name: str) -> str | None:
    """Return the path that a file will have which Remote Model File has come into one of ComfyUI's folders."""
    paths = (os.path.join(place, name) for place in folder_paths.get_folder_paths(folder))
    return next((path for path in paths if coming_file(path) is not None), None)


def _folder(folder: str, name: str) -> str | None:
    """Return the path of a folder below one of ComfyUI's, or below that of diffusers models."""
    inside = os.path.relpath(os.path.join(os.sep, name), os.sep)
    if inside == "." or "\0" in name:
        return None
    paths = (os.path.join(place, inside) for place in (*folder_paths.get_folder_paths(folder), *_diffusers()))
    return next((path for path in paths if may_be_model(path)), None)


def _diffusers() -> list[str]:
    known = folder_paths.folder_names_and_paths.get("diffusers")
    return list(known[0]) if known else []


def model_names(folder: str) -> list[str]:
    """List the files of one of ComfyUI's folders: those that ComfyUI lists, and GGUF files.

    A model in several files is listed by its index, and its parts are not.
    """
    found = set(folder_paths.get_filename_list(folder))
    indexes: set[str] = set()
    for place in folder_paths.get_folder_paths(folder):
        names = files_below(place)
        found.update(name for name in names if is_gguf(name))
        indexes.update(name for name in names if is_index(name))
    models = {(os.path.dirname(name), model_of(name)) for name in indexes}
    parts = {name for name in found if (part := part_of(name)) and (os.path.dirname(name), part.model) in models}
    return sorted({*(found - parts), *indexes})


def pipeline_names(folder: str) -> list[str]:
    """List the folders of diffusers pipelines, of which each loader takes what it loads."""
    found = set()
    for place in (*folder_paths.get_folder_paths(folder), *_diffusers()):
        found.update(os.path.dirname(name) for name in files_below(place) if os.path.basename(name) == PIPELINE)
    return sorted(found - {""})


def files_below(place: str) -> list[str]:
    """List the files below a folder, by their names in it."""
    return list(folder_paths.recursive_search(place, excluded_dir_names=[".git"])[0])


def shown(*patchers: Any) -> Any:
    """Return what was decided while they were loaded, for the node to show. None where nothing was."""
    noted = [words for patcher in patchers for words, _ in getattr(getattr(patcher, "state", None), "notes", ())]
    return ui.PreviewText("\n".join(noted)) if noted else None


def file_stamps(folder: str, *names: str | None) -> list[str]:
    """Say which files these are: another one under the same name, or one written again, makes a loader run anew.

    A name that comes over a wire is None, and whoever sends it says himself when it names another file.
    """
    stamps = []
    for name in names:
        if name is None:
            continue
        path = folder_paths.get_full_path(folder, name) or _folder(folder, name)
        # A loader says itself that a file is missing.
        stamps += [""] if path is None else [file_state(file) + " lost" * times_lost(file) for file in all_files(path)]
    return stamps


def all_files(path: str) -> list[str]:
    """List the files that a model may be loaded from: itself, an index and its parts, or all in a folder."""
    if os.path.isdir(path):
        return [os.path.join(path, name) for name in sorted(files_below(path))]
    return [str(file) for file in files_of(path)]


def _checkpoints() -> list[str]:
    """List checkpoints. Whole ones in GGUF stay with their own loaders."""
    return [name for name in model_names("checkpoints") if not is_gguf(name)]


class SpillwayLoadDiffusionModel(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoadDiffusionModel",
            display_name="Load Diffusion Model (Spillway)",
            category=CATEGORY,
            description="Loads a diffusion model almost at once and with almost no memory. Each weight is read when it "
            "is first used, and gives way when the memory is needed elsewhere.",
            search_aliases=[
                "load unet",
                "unet loader",
                "load diffusion model",
                "low vram",
                "dynamic vram",
                "gguf",
                "4 bit",
            ],
            inputs=[
                OpenChoice(
                    "unet_name",
                    options=[*model_names("diffusion_models"), *pipeline_names("diffusion_models")],
                    tooltip="A safetensors or GGUF file in models/diffusion_models, the index of a model in several "
                    "files, or a diffusers folder. Pickles must be converted first.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="The number format that the weights are kept in. 'default' follows the file and the "
                    "device. The fp8, mxfp8 and int8 choices halve the size of a 16-bit model, w4a8 and nvfp4 quarter "
                    "it. int8_auto is int8 only where that is faster. 'auto' takes the most exact with which all "
                    "weights fit, and says why. A GGUF file stays in its own blocks with 'default'.",
                ),
                policy_input(),
            ],
            outputs=[io.Model.Output(tooltip="A MODEL for any sampler. LoRA and hook nodes work on it as usual.")],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str, **_: Any) -> list[str]:
        return file_stamps("diffusion_models", unet_name)

    @classmethod
    def execute(cls, unet_name: str, weight_dtype: str, policy: Any = None) -> io.NodeOutput:
        path = model_path("diffusion_models", unet_name)
        model = load_diffusion_model(path, weight_dtype, policy)
        return io.NodeOutput(model, ui=shown(model))


class SpillwayLoadCheckpoint(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoadCheckpoint",
            display_name="Load Checkpoint (Spillway)",
            category=CATEGORY,
            description="Loads a checkpoint almost at once and with almost no memory. The weights of its model, text "
            "encoder, VAE and CLIP vision are read when they are first used.",
            search_aliases=["load checkpoint", "checkpoint loader", "ckpt", "low vram", "offload"],
            inputs=[
                OpenChoice(
                    "ckpt_name",
                    options=[*_checkpoints(), *pipeline_names("checkpoints")],
                    tooltip="A safetensors file in models/checkpoints, the index of a model in several files, or a "
                    "diffusers folder. Pickles must be converted first.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(CHECKPOINT_DTYPES),
                    default="default",
                    optional=True,
                    tooltip="The number format that the large layers of the MODEL are kept in. 'default' follows the "
                    "file. 'auto' takes the most exact with which all weights fit, and says why.",
                ),
                io.Combo.Input(
                    "clip_dtype",
                    options=list(TEXT_DTYPES),
                    default="default",
                    optional=True,
                    tooltip="The number format that the large layers of the CLIP are kept in. They are dequantised "
                    "where they are used.",
                ),
                policy_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model."),
                io.Clip.Output(tooltip="The text encoder. Empty if the file has none."),
                io.Vae.Output(tooltip="The VAE. Empty if the file has none."),
                io.ClipVision.Output(tooltip="The CLIP vision model (unCLIP, SVD). Empty if the file has none."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str, **_: Any) -> list[str]:
        return file_stamps("checkpoints", ckpt_name)

    @classmethod
    def execute(
        cls, ckpt_name: str, weight_dtype: str = "default", clip_dtype: str = "default", policy: Any = None
    ) -> io.NodeOutput:
        path, embeddings = model_path("checkpoints", ckpt_name), folder_paths.get_folder_paths("embeddings")
        parts = load_checkpoint(path, policy, embeddings, weight_dtype, clip_dtype)
        model, clip = parts[:2]
        return io.NodeOutput(*parts, ui=shown(model, getattr(clip, "patcher", None)))


class SpillwayLoadCLIP(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [*model_names("text_encoders"), *pipeline_names("text_encoders")]
        return io.Schema(
            node_id="SpillwayLoadCLIP",
            display_name="Load CLIP (Spillway)",
            category=CATEGORY,
            description="Loads one to four text encoder files as one CLIP. Their weights are read when they are "
            "first used.",
            search_aliases=[
                "load clip",
                "dual clip loader",
                "triple clip loader",
                "quadruple clip loader",
                "text encoder",
                "t5",
            ],
            inputs=[
                OpenChoice(
                    "clip_name1",
                    options=files,
                    tooltip="A safetensors or GGUF file in models/text_encoders, the index of a model in several "
                    "files, or a diffusers folder, of which all text encoders are loaded.",
                ),
                io.Combo.Input(
                    "type",
                    options=[kind.name.lower() for kind in comfy.sd.CLIPType],
                    default="stable_diffusion",
                    tooltip="The model family that the prompt is for, such as flux, sd3 or lumina2 (for Z-Image too).",
                ),
                OpenChoice(
                    "clip_name2",
                    options=[NONE, *files],
                    default=NONE,
                    optional=True,
                    tooltip="A second file, if the model needs one.",
                ),
                OpenChoice(
                    "clip_name3",
                    options=[NONE, *files],
                    default=NONE,
                    optional=True,
                    tooltip="A third file, if the model needs one.",
                ),
                policy_input(),
                OpenChoice(
                    "clip_name4",
                    options=[NONE, *files],
                    default=NONE,
                    optional=True,
                    tooltip="A fourth file, if the model needs one, as HiDream does.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(TEXT_DTYPES),
                    default="default",
                    optional=True,
                    tooltip="The number format that the large layers are kept in. They are dequantised where they are "
                    "used. 'default' follows the files. 'auto' takes the most exact with which all weights fit, and "
                    "says why.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="A CLIP for the text encode nodes.")],
        )

    @classmethod
    def fingerprint_inputs(
        cls, clip_name1: str, clip_name2: str = NONE, clip_name3: str = NONE, clip_name4: str = NONE, **_: Any
    ) -> list[str]:
        return file_stamps("text_encoders", clip_name1, clip_name2, clip_name3, clip_name4)

    @classmethod
    def execute(
        cls,
        clip_name1: str,
        type: str,
        clip_name2: str = NONE,
        clip_name3: str = NONE,
        policy: Any = None,
        clip_name4: str = NONE,
        weight_dtype: str = "default",
    ) -> io.NodeOutput:
        names = [clip_name1, *(name for name in (clip_name2, clip_name3, clip_name4) if name != NONE)]
        paths = [model_path("text_encoders", name) for name in names]
        clip = load_clip(paths, type, policy, folder_paths.get_folder_paths("embeddings"), weight_dtype)
        return io.NodeOutput(clip, ui=shown(clip.patcher))


class SpillwayLoadVAE(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayLoadVAE",
            display_name="Load VAE (Spillway)",
            category=CATEGORY,
            description="Loads a VAE. Its weights are read when they are first used.",
            search_aliases=["load vae", "vae loader", "low vram", "offload"],
            inputs=[
                OpenChoice(
                    "vae_name",
                    options=[*model_names("vae"), *pipeline_names("vae")],
                    tooltip="A safetensors or GGUF file in models/vae, or a diffusers folder. Pickles must be "
                    "converted first.",
                ),
                policy_input(),
            ],
            outputs=[io.Vae.Output(tooltip="A VAE for the VAE encode and decode nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, **_: Any) -> list[str]:
        return file_stamps("vae", vae_name)

    @classmethod
    def execute(cls, vae_name: str, policy: Any = None) -> io.NodeOutput:
        return io.NodeOutput(load_vae(model_path("vae", vae_name), policy))


class SpillwayMakeDynamic(CheckedNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpillwayMakeDynamic",
            display_name="Make Dynamic (Spillway)",
            category=CATEGORY,
            description="Hands a MODEL from any other loader to Spillway, with the LoRAs and patches it carries; a "
            "CLIP and a VAE too. The models that come in are not changed.",
            search_aliases=["convert model", "low vram", "offload", "dynamic vram", "block swap"],
            inputs=[
                io.Model.Input("model", tooltip="A MODEL from any loader, with or without LoRAs."),
                io.Clip.Input("clip", optional=True, tooltip="A CLIP that Spillway is to manage too."),
                io.Vae.Input("vae", optional=True, tooltip="A VAE that Spillway is to manage too."),
                policy_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model and patches, managed by Spillway."),
                io.Clip.Output(tooltip="The same CLIP, managed by Spillway. Empty if none was connected."),
                io.Vae.Output(tooltip="The same VAE, managed by Spillway. Empty if none was connected."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any = None, vae: Any = None, policy: Any = None) -> io.NodeOutput:
        return io.NodeOutput(
            dynamic_model(model, policy),
            None if clip is None else dynamic_clip(clip, policy),
            None if vae is None else dynamic_vae(vae, policy),
        )
