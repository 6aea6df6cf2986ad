"""What must hold whatever happens: which errors are none of a user's, what may lie on the disk, what must stay flat."""

import json
import re
import statistics
import struct

import psutil

from kit.pack import ROOT

# An error of these says that the code met what it did not expect, and not what a user did wrong.
INTERNAL = (
    "AttributeError",
    "KeyError",
    "TypeError",
    "AssertionError",
    "IndexError",
    "NameError",
    "UnboundLocalError",
    "ZeroDivisionError",
    "RecursionError",
    "NotImplementedError",
    "UnicodeEncodeError",
    "OverflowError",
)
OURS = ("Spillway", "INT8LazyTorchCompile")
# What never_raises says of an error outside of a node, and the disk tier of an entry that is not as it was written.
IN_LOG = re.compile(
    r"\[Spillway\] .* failed \(.*\); the server goes on without it\.|"
    r"\[Spillway\] .* is damaged .*|Exception ignored in.*|Fatal Python error.*"
)
FINISHED = (".output", ".json", ".safetensors")  # in the disk tier
MIB = 1 << 20


class Faults:
    """What was found wrong, each kind with its words."""

    LONGEST = 1500

    def __init__(self):
        self.found = []

    def add(self, kind, words):
        self.found.append((kind, words[: self.LONGEST]))
        print(f"FAULT {kind}: {words[: self.LONGEST]}", flush=True)


def error_of(history):
    """The error that ended a prompt; None where it ended well or was interrupted."""
    messages = history["status"]["messages"]
    return next((said for kind, said in messages if kind == "execution_error"), None)


def wrong_error(error, given=None):
    """Say what is wrong with the error of a prompt. None where a user can tell from it what to do.

    given: the inputs that made no sense, by name. The error must name one of them, or its value.
    """
    kind, message = error["exception_type"], error["exception_message"]
    trace = "".join(error["traceback"])
    ours = error["node_type"].startswith(OURS) or _in_pack(error["traceback"][-1:])
    where = f"{error['node_type']}: {kind}: {message}\n{trace[-700:]}"
    if kind.endswith("FileNotFoundError") and "/comfy/" in message and "/comfy/" in error["traceback"][-1]:
        return None  # this ComfyUI lacks a file of its own, which its error names
    if "/" in kind or "\\" in kind:
        return f"the error's type is a path. {where}"
    if ours and kind.split(".")[-1] in INTERNAL:
        return f"an error about internals. {where}"
    named = [word for name, value in (given or {}).items() for word in (name, str(value)[:30])]
    if given and error["node_type"].startswith(OURS) and not any(word in message for word in named):
        return f"the error names none of {named}. {where}"
    return None


def _in_pack(frames):
    return any("ComfyUI-Spillway" in frame or str(ROOT) in frame for frame in frames)


def faults_in_log(text):
    return sorted(set(IN_LOG.findall(text)))


# --- files ------------------------------------------------------------------------------------------------------------


def leftovers(base):
    """Files that belong to no living process and to no finished output."""
    output = [path for path in (base / "output").rglob("*") if path.name.startswith(".spillway-")]
    notes = [path for path in (base / "user" / "spillway-unfinished").glob("*")]
    tier = (base / "user" / "__spillway" / "outputs").glob("*")
    tier = [path for path in tier if path.name.startswith(".") or path.suffix not in FINISHED]
    return {str(path.relative_to(base)) for path in (*output, *notes, *tier)}


def half_files(base):
    """Files of ours under a final name that are not complete."""
    found = []
    for path in (base / "output" / "ours").rglob("*.safetensors"):
        if path.name.startswith("."):
            continue
        try:
            end = end_of(path)
        except (ValueError, struct.error) as error:
            found.append(f"{path}: {error}")
        else:
            if end != path.stat().st_size:
                found.append(f"{path}: {path.stat().st_size} of {end} bytes")
    return found


def header_of(path):
    """(header, where the data begins) of a safetensors file. Raises ValueError or struct.error for half of one."""
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        return json.loads(file.read(size)), 8 + size


def end_of(path):
    header, begin = header_of(path)
    return begin + max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)


# --- resources --------------------------------------------------------------------------------------------------------


class Resources:
    """RSS, threads and file descriptors of one server over time, each taken when all was freed."""

    FEWEST = 6  # samples, before anything is said of a trend

    def __init__(self, process):
        self.process = psutil.Process(process.pid)
        self.samples = []

    def sample(self):
        """Take one, and say what it is."""
        process = self.process
        self.samples.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
        rss, threads, descriptors = self.samples[-1]
        return f"RSS {rss / MIB:.0f} MiB, {threads} threads, {descriptors} descriptors"

    def trend(self):
        """Say what grew from the first third of the samples to the last."""
        third = len(self.samples) // 3
        if len(self.samples) < self.FEWEST:
            return None
        first = [statistics.median(values) for values in zip(*self.samples[:third], strict=True)]
        last = [statistics.median(values) for values in zip(*self.samples[-third:], strict=True)]
        limits = (first[0] * 1.1 + 100 * MIB, first[1] + 4, first[2] + 10)
        grew = [
            f"{what} from {before:.0f} to {after:.0f}"
            for what, before, after, limit in zip(("RSS", "threads", "descriptors"), first, last, limits, strict=True)
            if after > limit
        ]
        return f"{', '.join(grew)} in {len(self.samples)} samples" if grew else None
