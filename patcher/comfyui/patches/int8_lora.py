"""Decides whether LoRAs on quantised weights are merged and quantised once more, or stay beside as a low-rank branch.

A merged LoRA costs nothing at any step, and is rounded with the weight. A branch is exact, and costs its arithmetic at
every step. Beside weights of 4 bits it stays, unless a policy says otherwise, and so it does beside those that a file
has in 4 bits, which merging would round a second time.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.weight_adapter
import torch

from ....ops.gather import is_wrapper
from ....ops.ledger import Ledger
from ....ops.quantisation import Quantisation
from ..quantise.layouts import Form
from ..quantise.weight import with_branch
from .weight_patch import WeightPatch

# The relative error of a quantised weight. Rounding normal numbers costs 0.8 %, and as much again for the input.
ERROR_BOUND = 0.009
# Rounding with the LoRA counts as no worse while its error grows by no more than this factor.
NO_WORSE = 1.05
# Weights of fewer bits leave a LoRA beside them, unless a policy says otherwise.
FEWEST_MERGED = 8
# How many weights are looked at, the largest first, and how many rows of each.
SAMPLED_WEIGHTS, SAMPLED_ROWS = 8, 64


class BranchPatch(WeightPatch):
    """Holds patches that are all low-rank as one branch beside the weight.

    rank: of all of them together. form: of a weight that a file has in one of ComfyUI's formats; None for others.
    """

    def __init__(self, patch: WeightPatch, factors: list[tuple[torch.Tensor, torch.Tensor, float, Any]]) -> None:
        self.__dict__.update(patch.__dict__)
        self.factors = factors
        self.rank = sum(down.shape[0] for _, down, _, _ in factors)
        self.form: Form | None = None

    def beside(self, source: torch.Tensor, rank: int) -> torch.Tensor:
        """Make the template of a weight from a file with the branch beside it."""
        assert self.form is not None
        return with_branch(source, self.form, rank)

    def same_as(self, other: Any) -> bool:
        """Whether two patches give the same weight."""
        return super().same_as(other) and self.form == other.form

    def low_rank(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Build the matrices (rank, columns) and (rows, rank) in fp32, strengths included.

        Raises FileChanged where a file that they are read from has changed.
        """
        self.check_files()
        ups, downs = [], []
        for up, down, strength, offset in self.factors:
            wide_up, wide_down = (part.to(device, torch.float32).flatten(start_dim=1) for part in (up, down))
            if offset is not None:  # (dimension, first, length): for a part of the weight only
                dimension, first, length = offset
                after = self.shape[dimension] - first - length
                if dimension == 0:
                    wide_up = torch.nn.functional.pad(wide_up, (0, 0, first, after))
                else:
                    wide_down = torch.nn.functional.pad(wide_down, (first, after))
            ups.append(wide_up * strength)
            downs.append(wide_down)
        return torch.cat(downs), torch.cat(ups, 1)


def branch_of(patch: WeightPatch) -> BranchPatch | None:
    """Turn a patch into a branch. None where it is more than a sum of low-rank products of the weight's shape.

    ComfyUI meets a LoRA of another shape when it is merged, and logs an error for that weight.
    """
    if patch.hooked or tuple(patch.shape) != tuple(patch.weight.shape):
        return None
    factors = []
    for strength, value, strength_model, offset, function in patch.patches:
        if not isinstance(value, comfy.weight_adapter.LoRAAdapter) or function is not None or strength_model != 1.0:
            return None
        up, down, alpha, middle, dora_scale, reshape = value.weights[:6]
        if middle is not None or dora_scale is not None or reshape is not None:
            return None
        if not _product_fits(up, down, tuple(patch.shape), offset):
            return None
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        factors.append((up, down, strength * scale, offset))
    return BranchPatch(patch, factors)


def _product_fits(up: torch.Tensor, down: torch.Tensor, shape: tuple[int, ...], offset: Any) -> bool:
    """Say whether up @ down has the shape of the weight, or of the part of it that the offset names."""
    if min(up.dim(), down.dim()) < 2:
        return False
    part = list(shape)
    if offset is not None:  # (dimension, first, length)
        dimension, first, length = offset
        if first + length > part[dimension]:
            return False
        part[dimension] = length
    (rows, *ups), (rank, *columns) = up.shape, down.shape
    return math.prod(ups) == rank and [rows, math.prod(columns)] == part


def merge_errors(patch: BranchPatch, quantisation: Quantisation, device: torch.device) -> tuple[float, float]:
    """Measure by how much rounding changes some rows of a weight, relative: (without, with the LoRA)."""
    step = max(1, patch.shape[0] // SAMPLED_ROWS)
    weight = patch.weight
    weight = weight.dequantize()[::step] if is_wrapper(weight) else weight[::step]  # type: ignore[operator]
    rows = weight.to(device, torch.float32)
    down, up = patch.low_rank(device)
    return _error(rows, quantisation), _error(rows + up[::step] @ down, quantisation)


def _error(rows: torch.Tensor, quantisation: Quantisation) -> float:
    return float((quantisation.restored(rows) - rows).norm() / rows.norm().clamp_(min=1e-30))


def place_loras(
    patches: dict[str, WeightPatch],
    forms: Mapping[str, Quantisation | Form],
    mode: str,
    device: torch.device,
    ledger: Ledger,
) -> dict[str, WeightPatch]:
    """Put branches in the place of patches that are to stay beside their quantised weights.

    forms: of those weights, a Form for one that a file has. mode: 'merge', 'side branch' or 'auto'. 'auto' merges where
    rounding the sum is no worse than rounding normal numbers, or no worse than without the LoRA. The choice is one for
    the whole model, and goes to the ledger.
    """
    branches = {key: branch for key, patch in patches.items() if (branch := branch_of(patch)) is not None}
    if not branches or mode == "merge":
        return patches
    for key, branch in branches.items():
        form = forms[key]
        branch.form = form if type(form) is Form else None
    name = next(iter(forms.values())).name
    reason = "as the policy says"
    if mode == "auto" and any(forms[key].bits < FEWEST_MERGED for key in branches):
        reason = "weights of 4 bits round it too coarsely"
    elif mode == "auto":
        worst = (0.0, 0.0)
        with torch.no_grad():
            for key in sorted(branches, key=lambda key: -branches[key].weight.numel())[:SAMPLED_WEIGHTS]:
                worst = max(worst, merge_errors(branches[key], forms[key], device), key=_excess)
        reason = f"rounding changes the weights by {100 * worst[0]:.2f} %, with the LoRA by {100 * worst[1]:.2f} %"
        if _excess(worst) <= 0:
            ledger.decide_once(f"LoRA on {name}: merged and quantised once more; {reason}", level=logging.INFO)
            return patches
    ledger.decide_once(
        f"LoRA on {name}: a side branch beside {len(branches)} weights, exact, with some arithmetic at every step; "
        + reason,
        level=logging.INFO,
    )
    return {**patches, **branches}


def _excess(errors: tuple[float, float]) -> float:
    without, merged = errors
    return merged - max(ERROR_BOUND, NO_WORSE * without)
