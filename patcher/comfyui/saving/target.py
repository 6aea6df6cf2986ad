"""Asks ComfyUI where it would save a file, under which name, and with which metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import comfy_extras.nodes_model_merging
import folder_paths
import torch
from comfy.cli_args import args

from ....ops.overrides import overridden
from ....ops.writable import is_writable


@dataclass(frozen=True)
class Target:
    """Path, metadata, and tensors that describe the model."""

    path: str
    metadata: dict[str, str]
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


def journal() -> Path:
    """The file that notes unfinished files until they are complete or gone."""
    return Path(folder_paths.get_user_directory()) / "spillway-unfinished"


def check_prefix(prefix: str) -> None:
    """Raises ValueError for a name that leads out of the output folder, or is none."""
    output = folder_paths.get_output_directory()
    name = os.path.basename(os.path.normpath(prefix))
    folder = os.path.abspath(os.path.join(output, os.path.dirname(os.path.normpath(prefix))))
    if "\0" in prefix or not prefix.strip() or name in ("", ".", ".."):
        raise ValueError(f"filename_prefix {prefix!r} names no file. Give a name, such as 'diffusion_models/my_model'.")
    if not _is_inside(os.path.abspath(output), folder):
        raise ValueError(
            f"filename_prefix {prefix!r} leads to {folder}, outside the output folder {output}. Give a name or a "
            "subfolder of it, such as 'diffusion_models/my_model'."
        )


def _is_inside(folder: str, path: str) -> bool:
    try:
        return os.path.commonpath((folder, path)) == folder
    except ValueError:  # on another drive of Windows
        return False


def next_name(prefix: str) -> str:
    """Make the path of a new file by ComfyUI's counter. Raises ValueError for a prefix outside the output folder."""
    check_prefix(prefix)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
    return os.path.join(folder, f"{name}_{counter:05}_.safetensors")


def _as_queued(prompt: Any) -> Any:
    """Give the prompt as it was queued. ComfyUI notes in a running one what its loaders' files were."""
    if not isinstance(prompt, Mapping):
        return prompt
    return {
        number: {key: value for key, value in node.items() if key != "is_changed"} for number, node in prompt.items()
    }


def _writable(extra_pnginfo: Any) -> dict[str, Any]:
    """Give what is said about the workflow, as far as a file can hold it. Any JSON may come with a prompt."""
    if not isinstance(extra_pnginfo, Mapping):
        return {}
    return {key: value for key, value in extra_pnginfo.items() if is_writable(key)}


def workflow_metadata(prompt: Any, extra_pnginfo: Any) -> dict[str, str]:
    """Give the workflow as metadata, or nothing where the user has turned that off."""
    if args.disable_metadata:
        return {}
    metadata = {"prompt": json.dumps(_as_queued(prompt))} if prompt is not None else {}
    return {**metadata, **{key: json.dumps(value) for key, value in _writable(extra_pnginfo).items()}}


def checkpoint_target(model: Any, prefix: str, prompt: Any = None, extra_pnginfo: Any = None) -> Target:
    """Have ComfyUI's own save node prepare a model, and stop it before it saves.

    Raises ValueError for a prefix outside the output folder.
    """
    check_prefix(prefix)
    targets: list[Target] = []

    def note(_: Any, path: str, *unused: Any, metadata: Any = None, extra_keys: Any = None, **unknown: Any) -> None:
        targets.append(Target(path, dict(metadata or {}), dict(extra_keys or {})))

    with overridden(comfy.sd, "save_checkpoint", by=note):
        comfy_extras.nodes_model_merging.save_checkpoint(
            model,
            filename_prefix=prefix,
            output_dir=folder_paths.get_output_directory(),
            prompt=_as_queued(prompt),
            extra_pnginfo=_writable(extra_pnginfo),
        )
    return targets[0]
