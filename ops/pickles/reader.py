"""Unpickles with torch's weights-only reader, which makes tensors and plain data and calls nothing else."""

from __future__ import annotations

import functools
import io
import re
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from traceback import walk_tb
from typing import Any, BinaryIO

import torch

from ..files.safetensors_header import AGAIN, SourceError
from .left_out import BESIDE_WEIGHTS, left_out

# Under these names other programs keep the weights, beside an optimizer's state and the like. The first counts.
NAMES = ("model", "module", "params_ema", "params", "ema", "model_state_dict", "net")
REFUSED = re.compile(r"unsupported GLOBAL (\S+)|Unsupported global: GLOBAL (\S+)|Unsupported class (\S+)|class (\S+) ")
ORDINARY = (torch.Tensor, torch.nn.Parameter)


def unpickle(path: Path, file: BinaryIO, device: str) -> Any:
    """Return what a file holds. device: `meta` for tensors without numbers, of which only the places are known.

    What training programs write beside the weights is left out: nothing stands in its place. Raises SourceError for a
    pickle that would call anything else but what makes tensors, and names what it would call.
    """
    try:
        return _load(file, device)
    except Exception as error:  # errors of many kinds for a damaged pickle
        first = error
    if _asked(first) not in (None, *BESIDE_WEIGHTS):
        raise _refused(path, first)
    try:
        with left_out():
            try:
                return _load(file, device)
            except UnicodeDecodeError:  # Python 2 wrote texts as bytes, and so bytes of numpy that are no text
                return _load(file, device, "latin1")
    except Exception as error:
        raise _refused(path, error) from None


def _load(file: BinaryIO, device: str, encoding: str = "utf-8") -> Any:
    fake = device == "meta" and not _tells_places()
    file.seek(0)
    with warnings.catch_warnings(), torch.inference_mode(False), _fake_tensors() if fake else nullcontext():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location=device, weights_only=True, encoding=encoding)


@functools.cache
def _tells_places() -> bool:
    """Say whether torch notes where in a file the numbers of a tensor on `meta` lie. Torch 2.8 reads them instead."""
    file = io.BytesIO()
    torch.save({"": torch.zeros(1)}, file)
    file.seek(0)
    storage = torch.load(file, map_location="meta", weights_only=True)[""].untyped_storage()
    return getattr(storage, "_checkpoint_offset", None) is not None


def _fake_tensors() -> Any:
    """Return a context in which each torch notes that and reads nothing. Its tensors are of a class of their own."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes long to import, and few need it

    return FakeTensorMode()


def _kind(tensor: torch.Tensor) -> type:
    """Return the class of a tensor, which is an ordinary one where `_fake_tensors` made it."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return torch.Tensor if type(tensor) is getattr(module, "FakeTensor", None) else type(tensor)


def _asked(error: Exception) -> str | None:
    """Return the name of what a pickle asks to call, which torch refused."""
    found = REFUSED.search(str(error))
    return None if found is None else next(name for name in found.groups() if name).strip("'`\"")


def _refused(path: Path, error: Exception) -> SourceError:
    words = str(error)
    name = _asked(error)
    if name is not None:
        return SourceError(
            f"{path}: this pickle asks to call '{name}', which makes no tensor. A pickle may run any program, so this "
            "one was not run and nothing of it is used. Get the model as safetensors, from a source that you trust."
        )
    if ".tar format" in words:
        return SourceError(
            f"{path}: this is a tar archive as torch wrote them before 2017. It cannot be read without running it. "
            "Get the model as safetensors."
        )
    if any(frame.f_code.co_name == "_validate_loaded_sparse_tensors" for frame, _ in walk_tb(error.__traceback__)):
        # Torch 2.15 checks these by their numbers, which a tensor on meta has not, and does not say which it is.
        return SourceError(
            f"{path}: it holds a sparse tensor, which safetensors cannot hold. Save it as an ordinary tensor."
        )
    first = next((line.strip() for line in words.splitlines() if line.strip()), "")
    if isinstance(error, (io.UnsupportedOperation, AttributeError)) or not first:
        first = f"{type(error).__name__} {first}"
    reason = words.split("WeightsUnpickler error:")[-1].strip().splitlines() or [first]
    return SourceError(
        f"{path}: torch cannot read this file as a pickle of tensors ({type(error).__name__}: {reason[0][:200]}). It "
        f"is damaged or something else. {AGAIN}"
    )


def state_dict_of(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by key, as ComfyUI finds them: under `state_dict`, in an only entry, or as they are.

    Where there is none among these, those under one of NAMES, or in the only entry that has any. What is no tensor is
    left out. Raises SourceError where there is no tensor, or one whose numbers cannot be copied as they lie.
    """
    if not isinstance(loaded, Mapping):
        raise SourceError(
            f"{path}: the file holds a {type(loaded).__name__}; expected tensors by name. Get the model as safetensors."
        )
    chosen: Any = loaded
    if "state_dict" in loaded:
        chosen = loaded["state_dict"]
    elif len(loaded) == 1 and isinstance(next(iter(loaded.values())), Mapping):
        chosen = next(iter(loaded.values()))
    if not _has_tensors(chosen):
        chosen = _nested(path, chosen if isinstance(chosen, Mapping) else loaded)
    tensors = {}
    for key, value in chosen.items():
        if not isinstance(value, torch.Tensor):
            continue
        if not isinstance(key, str):
            raise SourceError(f"{path}: a tensor is named {key!r}, not by a text. Get the model as safetensors.")
        kind = _kind(value)
        if kind not in ORDINARY or value.layout is not torch.strided or value.is_quantized:
            raise SourceError(
                f"{path}: '{key}' is a {kind.__name__} ({value.layout}, {value.dtype}), which safetensors "
                "cannot hold. Save it as an ordinary tensor."
            )
        if value.is_conj() or value.is_neg():
            raise SourceError(
                f"{path}: '{key}' is a {kind.__name__} of which another sign is meant than is written, so it "
                "cannot be copied as it lies. Save it after resolve_conj and resolve_neg."
            )
        tensors[key] = value.detach()
    return tensors


def without_numbers(path: Path, key: str) -> SourceError:
    """Make the error for a tensor that was saved from the meta device."""
    return SourceError(f"{path}: '{key}' has no numbers, only a shape. Save the model again, with its weights.")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(one, torch.Tensor) for one in value.values())


def _nested(path: Path, outer: Mapping[Any, Any]) -> Mapping[Any, Any]:
    having = [name for name, value in outer.items() if _has_tensors(value)]
    chosen = next((name for name in NAMES if name in having), having[0] if len(having) == 1 else None)
    if chosen is None:
        what = f"tensors under {', '.join(map(repr, having[:5]))}, and not which are the model's" if having else "none"
        raise SourceError(
            f"{path}: expected tensors by name, found {what}. Save the model's own state_dict alone, or get it as "
            "safetensors."
        )
    found: Mapping[Any, Any] = outer[chosen]
    return found
