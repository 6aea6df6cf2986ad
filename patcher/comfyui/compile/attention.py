"""Lets compiled blocks call ComfyUI's attention.

On devices without a fused attention, ComfyUI divides the work by how much memory is free at the moment. A trace cannot
follow that, and a graph that froze it would run out of memory later. There the graph calls ComfyUI's function as one
opaque op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import comfy.ldm.modules.attention as comfy_attention
import torch

# ComfyUI's functions that look at free memory, and what they read beside their tensors.
BY_FREE_MEMORY = frozenset(("attention_split", "attention_sub_quad"))
PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
READ = frozenset((*PARAMETERS, "enable_gqa", "scale"))
IGNORED = frozenset(("_inside_attn_wrapper", "low_precision_attention", "transformer_options"))


def _opaque(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: Optional[torch.Tensor],  # noqa: UP045 - torch reads these annotations
    attn_precision: Optional[torch.dtype],  # noqa: UP045
    skip_reshape: bool,
    skip_output_reshape: bool,
    scale: Optional[float],  # noqa: UP045
    enable_gqa: bool,
) -> torch.Tensor:
    more: dict[str, Any] = {} if scale is None else {"scale": scale}
    if enable_gqa:
        more["enable_gqa"] = True
    out = getattr(comfy_attention, name)(
        q,
        k,
        v,
        heads,
        mask=mask,
        attn_precision=attn_precision,
        skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape,
        **more,
    )
    return out.contiguous()  # type: ignore[no-any-return]


def _shape_of_result(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None,
    attn_precision: torch.dtype | None,
    skip_reshape: bool,
    skip_output_reshape: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    batch, tokens = q.shape[0], q.shape[-2]
    width = q.shape[-1] if skip_reshape else q.shape[-1] // heads
    if skip_output_reshape:
        return q.new_empty((batch, heads, tokens, width))
    return q.new_empty((batch, tokens, heads * width))


# torch reads the annotations of the function that it is given. Here they are strings, and it needs objects.
_opaque.__annotations__ = {
    "name": str,
    "q": torch.Tensor,
    "k": torch.Tensor,
    "v": torch.Tensor,
    "heads": int,
    "mask": Optional[torch.Tensor],  # noqa: UP045
    "attn_precision": Optional[torch.dtype],  # noqa: UP045
    "skip_reshape": bool,
    "skip_output_reshape": bool,
    "scale": Optional[float],  # noqa: UP045
    "enable_gqa": bool,
    "return": torch.Tensor,
}
_op = torch.library.custom_op("spillway::attention", _opaque, mutates_args=())
_op.register_fake(_shape_of_result)


def traceable_attention(attention: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the attention that ComfyUI chose, in a way that a graph can hold.

    Given to ComfyUI as `optimized_attention_override` while a block is compiled.
    """
    given = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
    name = getattr(attention, "__name__", "")
    if name not in BY_FREE_MEMORY or len(args) > len(PARAMETERS) or set(given) - READ - IGNORED or "heads" not in given:
        return attention(*args, **kwargs)
    return _op(
        name,
        *args[:3],
        given["heads"],
        given.get("mask"),
        given.get("attn_precision"),
        given.get("skip_reshape", False),
        given.get("skip_output_reshape", False),
        given.get("scale"),
        given.get("enable_gqa", False),
    )
