"""A pack of ComfyUI's that lets a server load narrow files of kinds that it otherwise builds in one size alone.

Its folder is linked into the `custom_nodes` of a server's folder. No node of a workflow has to know.
"""

import functools
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))

import comfy.ldm.flux.redux
import comfy.sd

from kit.comfyui import checkpoints

NODE_CLASS_MAPPINGS: dict[str, type] = {}

as_long_as_the_server = ExitStack()
for narrow in (
    checkpoints.encoders_as(checkpoints.SIGLIP),
    checkpoints.small_patches(uso_hidden=checkpoints.SMALL_USO),
    checkpoints.two_layers_of_audio(),
):
    as_long_as_the_server.enter_context(narrow)

_load_clip = comfy.sd.load_clip


@functools.wraps(_load_clip)
def _narrow_clip(*args, model_options=None, **named):
    return _load_clip(*args, model_options={**checkpoints.T5XXL_SMALL_OPTIONS, **(model_options or {})}, **named)


comfy.sd.load_clip = _narrow_clip
comfy.ldm.flux.redux.ReduxImageEncoder = functools.partial(
    comfy.ldm.flux.redux.ReduxImageEncoder, txt_in_features=checkpoints.T5XXL_SMALL["d_model"]
)
