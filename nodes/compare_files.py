"""Compares what two runs of a graph show: pictures with all their frames, sound, and latents."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import av
import folder_paths
import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from safetensors import safe_open

log = logging.getLogger("spillway")

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi")
SOUNDS = (".flac", ".mp3", ".opus", ".ogg", ".wav", ".m4a", ".aac")
LATENTS = (".latent",)
KINDS = ("pictures", "sounds", "latents")
MOST_PIXELS = 1 << 28

Numbers = NDArray[Any]


class Shown(NamedTuple):
    """A file that a node shows. place: among all that it shows."""

    node: str
    place: int
    path: str


def shown_files(history: dict[str, Any]) -> list[Shown]:
    """List the files that nodes show, whatever they call them: images, gifs, audio, latents."""
    found = []
    for node, shown in (history.get("outputs") or {}).items():
        entries = [one for entry in shown.values() if isinstance(entry, (list, tuple)) for one in entry]
        for place, entry in enumerate(entry for entry in entries if isinstance(entry, dict)):
            base = folder_paths.get_directory_by_type(str(entry.get("type", "")))
            name = str(entry.get("filename") or "")
            path = _inside(base, str(entry.get("subfolder") or ""), name) if base and name else None
            if path is not None:
                found.append(Shown(str(node), place, path))
    return found


def _inside(base: str, *parts: str) -> str | None:
    """Join what a node says to ComfyUI's folder, None where that leads out of it: a prompt can have the words."""
    base = os.path.abspath(base)
    path = os.path.abspath(os.path.join(base, *parts))  # of the text alone: a name of another machine is not asked for
    if not path.startswith(base + os.sep):
        return None
    real = os.path.realpath(path)
    return real if real.startswith(os.path.realpath(base) + os.sep) else None


def compared(theirs: list[Shown], ours: list[Shown]) -> dict[str, Any]:
    """Compare what two runs show: {kind: {count, frames, equal, most, other}}, and `left`, which names other files.

    most: the largest difference, of pictures in 255ths, of sound in parts of full scale, of latents as they are. other:
    how many have another size or length, are in one run alone, or hold what is no number.
    """
    one, other = ({(shown.node, shown.place): shown.path for shown in files} for files in (theirs, ours))
    told: dict[str, Any] = {kind: {"count": 0, "frames": 0, "equal": 0, "most": 0, "other": 0} for kind in KINDS}
    told["left"] = []
    for key in sorted({*one, *other}):
        paths = [path for path in (one.get(key), other.get(key)) if path is not None]
        try:
            found = {
                kind: difference(*(read(path) for path in paths)) if len(paths) == 2 else (1, None)
                for kind, read in _readers(paths[0]).items()
            }
        except Exception as error:  # whatever is wrong with a file: the others are compared all the same
            log.warning("[Spillway] comparing with ComfyUI: %s cannot be read: %s", paths[0], error)
            found = {}
        if not found:
            told["left"].append(f"{os.path.basename(paths[0])} ({key[0]})")
        for kind, (frames, most) in found.items():
            count = told[kind]
            count["count"] += 1
            count["frames"] += frames
            count["equal"] += most == 0
            count["other"] += most is None
            count["most"] = max(count["most"], most or 0)
    return told


def difference(one: Iterator[Numbers], other: Iterator[Numbers]) -> tuple[int, float | None]:
    """Return how many frames were looked at, and their largest difference. None where they are not to be compared."""
    frames, most = 0, 0.0
    for first, second in itertools.zip_longest(one, other):
        frames += 1
        if first is None or second is None or first.shape != second.shape:
            return frames, None
        if not numpy.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
            apart = float(numpy.abs(first - second).max(initial=0))
            if not math.isfinite(apart):
                return frames, None
            most = max(most, apart)
    return frames, int(most) if most == int(most) else most


def _readers(path: str) -> dict[str, Callable[[str], Iterator[Numbers]]]:
    """Say how a file is read, by the kinds of what is in it. Empty for a file that is not known."""
    name = path.lower()
    if name.endswith(VIDEOS):
        with av.open(path) as video:
            found = {"pictures": frames_of_video} if video.streams.video else {}
            return {**found, "sounds": sound_of} if video.streams.audio else found
    for endings, kind, read in (
        (PICTURES, "pictures", frames_of_picture),
        (SOUNDS, "sounds", sound_of),
        (LATENTS, "latents", latents_of),
    ):
        if name.endswith(endings):
            return {kind: read}
    return {}


def frames_of_picture(path: str) -> Iterator[Numbers]:
    """Give a picture's frames as numbers from 0 to 255. Those of 16 bits keep their parts."""
    with Image.open(path) as picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"{os.path.basename(path)} has more than {MOST_PIXELS:,} pixels, too many to compare.")
        for frame in ImageSequence.Iterator(picture):
            wide = frame.mode.startswith("I")
            numbers = numpy.asarray(frame if wide else frame.convert("RGBA"))
            yield numbers.astype(numpy.float64) / 257 if wide else numbers.astype(numpy.int16)


def frames_of_video(path: str) -> Iterator[Numbers]:
    """Give a video's frames as numbers from 0 to 255."""
    with av.open(path) as video:
        for frame in video.decode(video=0):
            yield frame.to_ndarray(format="rgb24").astype(numpy.int16)


def sound_of(path: str) -> Iterator[Numbers]:
    """Give a file's sound in parts of full scale, piece by piece."""
    with av.open(path) as sound:
        for frame in sound.decode(audio=0):
            numbers = frame.to_ndarray()
            scale = 1 if numbers.dtype.kind == "f" else -float(numpy.iinfo(numbers.dtype).min or -128)
            yield numbers.astype(numpy.float64) / scale


def latents_of(path: str) -> Iterator[Numbers]:
    """Give the tensors of a saved latent, in the order of their names."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            yield file.get_tensor(name).to(torch.float64).numpy()


def in_sentences(told: dict[str, Any]) -> list[str]:
    """Say whether what two runs show is equal."""
    lines = [_in_sentence(kind, told[kind]) for kind in KINDS if told.get(kind, {}).get("count")]
    if not lines:
        lines = ["The graph shows nothing that could be compared."]
    if told.get("left"):
        lines.append(f"Not compared, as these files are none that can be read here: {', '.join(told['left'])}.")
    return lines


def _in_sentence(kind: str, told: dict[str, Any]) -> str:
    by, unit = {
        "pictures": ("pixel by pixel", " of 255"),
        "sounds": ("sample by sample", " of full scale"),
        "latents": ("number by number", ""),
    }[kind]
    count, equal, other = told["count"], told["equal"], told["other"]
    several = kind == "pictures" and told["frames"] > count
    begin = f"{kind.capitalize()}: {equal} of {count} are equal"
    if equal == count:
        return f"{begin}, {by}{', in all their ' + str(told['frames']) + ' frames' if several else ''}."
    ends = [f"others differ by up to {told['most']:.3g}{unit}"] if equal + other < count else []
    ends += [f"{other} are in one run alone or have another size or length"] if other else []
    return f"{begin}; {', and '.join(ends)}."
