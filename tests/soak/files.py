"""The model files that the servers share. Several variants of a name replace each other."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Name: how many variants there are, which have the same size. Those with one are never replaced.
VARIANTS = {
    "diffusion_models/flux": 3,
    "diffusion_models/second": 1,
    "diffusion_models/large": 1,
    "checkpoints/sd15": 1,
    "text_encoders/clip": 1,
    "vae/ae": 2,
    "loras/detail": 3,
    "loras/light": 2,
    "embeddings/style": 2,
}
REPLACED = [name for name, count in VARIANTS.items() if count > 1]
# ComfyUI's own text encode node does not run again for another embedding. That is only replaced while no server is up.
WHILE_UP = [name for name in REPLACED if not name.startswith("embeddings/")]
WAYS = ("by rename", "by rename, same time", "in place", "in place, same time")
WRITER = Path(__file__).parent / "write_files.py"


def write_variants(folder):
    """Write all variants, in a process that imports ComfyUI and whose memory goes with it."""
    tests = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {tests!r}); import soak.write_files as w; w.main(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=folder)


def variant_path(folder, name, number):
    return Path(folder) / f"{name}-{number}.safetensors"


class Files:
    """The files of the disturbed servers: which variant lies under each name."""

    def __init__(self, variants, models):
        self.variants, self.models = variants, models
        self.current = dict.fromkeys(VARIANTS, 0)
        for name in VARIANTS:
            path = self.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(variant_path(variants, name, 0), path)

    def path(self, name):
        return self.models / f"{name}.safetensors"

    def replace(self, name, number, way):
        """Put a variant under a name, in one of WAYS."""
        source, path = variant_path(self.variants, name, number), self.path(name)
        before = path.stat()
        if way.startswith("by rename"):
            new = path.with_suffix(".new")
            shutil.copyfile(source, new)
        else:
            new = path
            with open(path, "r+b") as file:
                file.write(source.read_bytes())
        if way.endswith("same time"):
            os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        if new is not path:
            os.replace(new, path)
        self.current[name] = number

    def resolved(self, text):
        """A text (a prompt as JSON) with each name replaced by that of the variant under it."""
        for name, number in self.current.items():
            stem = re.escape(name.split("/")[1])
            text = re.sub(rf"\b{stem}(?=\.safetensors)|(?<=embedding:){stem}\b", rf"\g<0>-{number}", text)
        return text


def link_variants(variants, models):
    """Put every variant under a name of its own, for a server whose files never change."""
    for name, count in VARIANTS.items():
        for number in range(count):
            path = variant_path(models, name, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(variant_path(variants, name, number), path)
