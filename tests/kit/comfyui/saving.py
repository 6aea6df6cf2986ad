"""Save with the pack's nodes and with ComfyUI's own, and compare the files."""

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import safetensors.torch
import torch
from comfy_extras.nodes_model_merging import CheckpointSave, ModelSave

from kit.comfyui import checkpoints
from spillway.nodes import save as save_nodes
from spillway.nodes.save import SpillwaySaveCheckpoint, SpillwaySaveDiffusionModel

PREFIX = "model.diffusion_model."


def save(model, dtype="as loaded", name="ours", **others):
    node = SpillwaySaveCheckpoint if others else SpillwaySaveDiffusionModel
    return node.execute(model=model, filename_prefix=name, dtype=dtype, **others).args[0]


def comfyui_save(model, name="comfyui", **others):
    """Save with ComfyUI's node and return the path."""
    target = save_nodes.checkpoint_target(model, name).path
    node = CheckpointSave() if others else ModelSave()
    node.output_dir = folder_paths.get_output_directory()
    node.save(model=model, filename_prefix=name, **others)
    return target


def read(path):
    """Read tensors and metadata with the reference implementation."""
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same_tensors(got, wanted):
    assert set(got) == set(wanted)
    for key in wanted:
        assert got[key].dtype == wanted[key].dtype and got[key].shape == wanted[key].shape, key
        assert torch.equal(got[key].reshape(-1).view(torch.uint8), wanted[key].reshape(-1).view(torch.uint8)), key


def cast(tensors, dtype):
    return {key: t.to(dtype) if t.dtype.is_floating_point else t for key, t in tensors.items()}


def like(tensors, others):
    """Give tensors the dtypes of others. What was written as bytes stands for the same bytes."""
    dtypes = {key: others[key].dtype for key in tensors}
    return {
        key: tensor.view(dtypes[key])
        if tensor.dtype is torch.uint8 and dtypes[key].itemsize == 1
        else tensor.to(dtypes[key])
        for key, tensor in tensors.items()
    }


def everywhere(path, tmp_path, **options):
    return comfy.utils.load_torch_file(checkpoints.lora(tmp_path / "lora" / "lora.safetensors", path, **options))
