"""What a prompt made, as a digest for each of its nodes. What a fresh server makes of it must be the same."""

import hashlib
import json
import os
import re

import numpy as np
from PIL import Image

from .files import link_variants
from .invariants import header_of
from .servers import WatchedServer

SAVES = ("SpillwaySaveDiffusionModel", "SpillwaySaveCheckpoint", "SpillwaySaveLora")


def digests(base, prompt, history):
    """{node: digest} of the files that a prompt saved. Metadata, which holds the prompt, is left out."""
    found = {}
    for name, output in history["outputs"].items():
        files = [one for kind in ("images", "latents") for one in output.get(kind, [])]
        paths = [base / "output" / one["subfolder"] / one["filename"] for one in files]
        if prompt[name]["class_type"] in SAVES:
            saved = output["text"][0].split(": ")[0]
            paths = [base / "output" / os.path.dirname(prompt[name]["inputs"]["filename_prefix"]) / saved]
        if paths:
            found[name] = " ".join(map(digest, paths))
    return found


def digest(path):
    if path.suffix == ".png":
        picture = np.asarray(Image.open(path))
        return hashlib.sha256(f"{picture.shape}".encode() + picture.tobytes()).hexdigest()[:16]
    header, begin = header_of(path)
    header.pop("__metadata__", None)
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    with open(path, "rb") as file:
        file.seek(begin)
        while data := file.read(1 << 24):
            total.update(data)
    return total.hexdigest()[:16]


def key_of(prompt, files):
    """A prompt with the names of the variants that lie under its names now, as JSON. Prefixes do not count."""
    text = json.dumps(prompt, sort_keys=True)
    return files.resolved(re.sub(r'("filename_prefix": )"[^"]*"', r'\1"fresh/x"', text))


class Reference:
    """A fresh server with ComfyUI's own cache, which nothing disturbs and whose files never change."""

    def __init__(self, base, variants):
        self.base = base
        link_variants(variants, base / "models")
        self.server = WatchedServer(base, SPILLWAY_CACHE="0")
        self.answers = {}

    def answer(self, key):
        """The digests of a prompt (see key_of). It must succeed."""
        if key not in self.answers:
            prompt = json.loads(key)
            history = self.server.run(prompt)
            assert history["status"]["status_str"] == "success", json.dumps(history["status"], indent=1)
            self.answers[key] = digests(self.base, prompt, history)
        return self.answers[key]
