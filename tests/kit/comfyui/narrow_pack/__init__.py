"""A pack of ComfyUI's that lets a server load narrow files of kinds that it otherwise builds in one size alone.

It also leaves out the minute and a half in which `inductor` makes kernels of a Flux: blocks are traced and guarded as
ever, and their graphs run as they were traced. Its folder is linked into the `custom_nodes` of a server's folder. No
node of a workflow has to know.
"""

import functools
import inspect
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

import comfy.ldm.flux.redux
import comfy.sd
import torch

from kit.comfyui import checkpoints

NODE_CLASS_MAPPINGS: dict[str, type] = {}

as_long_as_the_server = ExitStack()
for narrow in (
    checkpoints.encoders_as(checkpoints.SIGLIP),
    checkpoints.small_patches(uso_hidden=checkpoints.SMALL_USO),
    checkpoints.two_layers_of_audio(),
):
    as_long_as_the_server.enter_context(narrow)

checkpoints.accept_small_lumina()
_load_clip, _detect_te_model = comfy.sd.load_clip, comfy.sd.detect_te_model
_OPTIONS = {**checkpoints.T5XXL_SMALL_OPTIONS, **checkpoints.small_llama_options("qwen3_4b")}


@functools.wraps(_load_clip)
def _narrow_clip(*args, **named):
    given = inspect.signature(_load_clip).bind(*args, **named).arguments
    return _load_clip(**{**given, "model_options": {**_OPTIONS, **given.get("model_options", {})}})


@functools.wraps(_detect_te_model)
def _narrow_qwen(sd):
    """ComfyUI knows a Qwen 3 by its width, and none is as narrow."""
    width = len(sd.get("model.layers.0.post_attention_layernorm.weight", ()))
    if width == _OPTIONS["qwen3_4b_model_config"]["hidden_size"] and "model.layers.0.self_attn.q_norm.weight" in sd:
        return comfy.sd.TEModel.QWEN3_4B
    return _detect_te_model(sd)


comfy.sd.load_clip, comfy.sd.detect_te_model = _narrow_clip, _narrow_qwen
comfy.ldm.flux.redux.ReduxImageEncoder = functools.partial(
    comfy.ldm.flux.redux.ReduxImageEncoder, txt_in_features=checkpoints.T5XXL_SMALL["d_model"]
)

_compile = torch.compile


@functools.wraps(_compile)
def _traced(*args, backend="inductor", mode=None, options=None, **named):
    return _compile(*args, backend="eager" if backend == "inductor" else backend, **named)


torch.compile = _traced
