"""Foresees one sampling: what stays of the model, what each step brings, and the most memory that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import sizes
from ..loads import needed_bytes
from .sketch import Loaded, sketch
from .use import foresee_use


@dataclass(frozen=True)
class Latent:
    """The size of what is sampled, in pixels and pictures. length: frames; 1 for a picture."""

    width: int
    height: int
    batch: int = 1
    length: int = 1

    def shape(self, patcher: Any) -> tuple[int, ...]:
        """Give the shape of the latent that a model samples for it."""
        form = patcher.get_model_object("latent_format")
        across = int(getattr(form, "spacial_downscale_ratio", 8) or 8)
        along = int(getattr(form, "temporal_downscale_ratio", 4) or 4)
        frames = () if form.latent_dimensions < 3 else ((self.length - 1) // along + 1,)
        return (self.batch, form.latent_channels, *frames, self.height // across, self.width // across)


def foresee_sampling(wanted: Loaded, latent: Latent, guided: bool, all_models: int | None) -> dict[str, Any]:
    """Foresee a sampling, ready for JSON. guided: with two conditions. all_models: the cap over all models, in bytes.

    Raises what the loaders raise.
    """
    patcher, unknown = sketch(wanted)
    try:
        shape = latent.shape(patcher)
        required = patcher.model.memory_required([2 * shape[0], *shape[1:]])
        once = patcher.model.memory_required([shape[0] * (2 if guided else 1), *shape[1:]])
        expected = needed_bytes(required, samples=True)
        told = foresee_use(patcher, sizes.of_sampling(shape, guided), int(once), expected, all_models, unknown)
        return told | {"latent": list(shape)}
    finally:
        patcher.state.close()
