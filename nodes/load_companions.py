"""Loads what stands beside a diffusion model, with weights that stay in their file until they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import folder_paths
from comfy_api.latest import io

from ..patcher.comfyui.loading import companions
from .checked_node import CheckedNode
from .inputs import CATEGORY, OpenChoice, policy_input
from .load import file_stamps, model_path

ModelPatchType = io.Custom("MODEL_PATCH")
AudioEncoderType = io.Custom("AUDIO_ENCODER")


class _Loader(CheckedNode):
    """A node that loads one file of one of ComfyUI's folders.

    entry: the input's name, which is that of ComfyUI's own node. what: the file in words.
    """

    folder: ClassVar[str]
    entry: ClassVar[str]
    what: ClassVar[str]

    @classmethod
    def schema(cls, name: str, description: str, aliases: list[str], output: Any, *more: io.Input) -> io.Schema:
        return io.Schema(
            node_id=cls.__name__,
            display_name=f"{name} (Spillway)",
            category=CATEGORY,
            description=description,
            search_aliases=[*aliases, "low vram", "offload"],
            inputs=[
                OpenChoice(
                    cls.entry,
                    options=folder_paths.get_filename_list(cls.folder),
                    tooltip=f"{cls.what} in models/{cls.folder}, as a safetensors file.",
                ),
                policy_input(),
                *more,
            ],
            outputs=[output],
        )

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> list[str]:
        return file_stamps(cls.folder, given[cls.entry])

    @classmethod
    def load(cls, load: Callable[..., Any], name: str, policy: Any, *more: Any) -> io.NodeOutput:
        return io.NodeOutput(load(model_path(cls.folder, name), policy, *more))


class SpillwayLoadCLIPVision(_Loader):
    folder, entry, what = "clip_vision", "clip_name", "An image encoder"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Load CLIP Vision",
            "Loads an image encoder: CLIP vision, SigLIP or DINO. Its weights are read when they are first used.",
            ["load clip vision", "clip vision loader", "siglip", "image encoder", "redux", "uso", "ip adapter"],
            io.ClipVision.Output(tooltip="A CLIP vision model for the nodes that encode images."),
        )

    @classmethod
    def execute(cls, clip_name: str, policy: Any = None) -> io.NodeOutput:
        return cls.load(companions.load_clip_vision, clip_name, policy)


class SpillwayLoadControlNet(_Loader):
    folder, entry, what = "controlnet", "control_net_name", "A ControlNet, Control-LoRA or T2I adapter"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Load ControlNet",
            "Loads a ControlNet. Its weights are read when they are first used, and give way like those of a model. "
            "T2I adapters are small, and are loaded as a whole.",
            ["load controlnet", "controlnet loader", "control lora", "t2i adapter", "canny", "depth", "pose"],
            io.ControlNet.Output(tooltip="A ControlNet for the nodes that apply one."),
            io.Model.Input(
                "model",
                optional=True,
                tooltip="The MODEL that the file's differences are added to. Only difference ControlNets need one.",
            ),
        )

    @classmethod
    def execute(cls, control_net_name: str, policy: Any = None, model: Any = None) -> io.NodeOutput:
        return cls.load(companions.load_controlnet, control_net_name, policy, model)


class SpillwayLoadUpscaleModel(_Loader):
    folder, entry, what = "upscale_models", "model_name", "An upscale model"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Load Upscale Model",
            "Loads an upscale model. Its weights are read when they are first used.",
            ["load upscale model", "upscale model loader", "esrgan", "swinir", "super resolution"],
            io.UpscaleModel.Output(tooltip="An upscale model for the nodes that upscale an image with one."),
        )

    @classmethod
    def execute(cls, model_name: str, policy: Any = None) -> io.NodeOutput:
        return cls.load(companions.load_upscale_model, model_name, policy)


class SpillwayLoadAudioEncoder(_Loader):
    folder, entry, what = "audio_encoders", "audio_encoder_name", "An audio encoder"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Load Audio Encoder",
            "Loads an audio encoder: wav2vec 2 or Whisper. Its weights are read when they are first used.",
            ["load audio encoder", "audio encoder loader", "wav2vec", "whisper", "speech to video", "s2v"],
            AudioEncoderType.Output(display_name="AUDIO_ENCODER", tooltip="An encoder for Audio Encoder Encode."),
        )

    @classmethod
    def execute(cls, audio_encoder_name: str, policy: Any = None) -> io.NodeOutput:
        return cls.load(companions.load_audio_encoder, audio_encoder_name, policy)


class SpillwayLoadStyleModel(_Loader):
    folder, entry, what = "style_models", "style_model_name", "A style model"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Load Style Model",
            "Loads a style model, such as Flux Redux. Its weights are read when they are first used.",
            ["load style model", "style model loader", "redux", "style adapter"],
            io.StyleModel.Output(tooltip="A style model for Apply Style Model."),
        )

    @classmethod
    def execute(cls, style_model_name: str, policy: Any = None) -> io.NodeOutput:
        return cls.load(companions.load_style_model, style_model_name, policy)


class SpillwayLoadModelPatch(_Loader):
    folder, entry, what = "model_patches", "name", "A model patch"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            "Load Model Patch",
            "Loads a model patch: USO, the control patches of Qwen-Image and Z-Image, Uni3C and others that your "
            "ComfyUI knows. Its weights are read when they are first used.",
            ["load model patch", "model patch loader", "uso", "diffsynth", "fun controlnet", "control patch"],
            ModelPatchType.Output(display_name="MODEL_PATCH", tooltip="A patch for the nodes that apply one."),
        )

    @classmethod
    def execute(cls, name: str, policy: Any = None) -> io.NodeOutput:
        model_path(cls.folder, name)  # says where it was looked for
        return io.NodeOutput(companions.load_model_patch(name, policy))


LOADERS: list[type[io.ComfyNode]] = [
    SpillwayLoadCLIPVision,
    SpillwayLoadControlNet,
    SpillwayLoadUpscaleModel,
    SpillwayLoadAudioEncoder,
    SpillwayLoadStyleModel,
    SpillwayLoadModelPatch,
]
