"""Each command of the pages runs as it stands there, but for what makes it small (`tests/kit/page_commands.py`)."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

from cuda_sim import Unavailable, build
from cuda_sim.wheels import VERSIONS, package
from kit.environment import ROOT, test_environment
from kit.find_comfyui import find_comfyui, find_comfyui_python
from kit.nets import Stack, write
from kit.page_commands import RUN
from kit.skips import skip_loudly

GGUF_PACK = "SPILLWAY_COMFYUI_GGUF"  # names a checkout of ComfyUI-GGUF
HERE = "https://github.com/spillway-comfy/ComfyUI-Spillway"
LIMIT = 900


@pytest.fixture
def folder(tmp_path):
    """A folder with a model, two pickles, a folder for what is made of them, and one for custom nodes."""
    write(tmp_path / "stack.safetensors", Stack(2))
    for name in ("model", "other"):
        torch.save({"weight": torch.ones(4, 4)}, tmp_path / f"{name}.ckpt")
    for name in ("to", "custom_nodes"):
        (tmp_path / name).mkdir()
    return tmp_path


def comfyui():
    found = find_comfyui()
    if not found or not find_comfyui_python(found):
        pytest.skip("needs a ComfyUI; the end of `dev.py test` says that there is none")
    return str(found)


def in_place(command, folder):
    """The words of a command with what stands for the placeholders of its page."""
    words = []
    for word in shlex.split(command):
        if word == "python":
            words.append(sys.executable)
        elif word == "dev.py":
            words.append(str(ROOT / word))
        elif word in ("FILE", "FILE..."):
            files = ["stack.safetensors"] if "probe" in command else ["model.ckpt", "other.ckpt"][: 1 + ("..." in word)]
            words += [str(folder / name) for name in files]
        elif word == "FOLDER" and "--pack" in command:
            words.append(os.environ.get(GGUF_PACK) or skip_loudly(f"`{command}`: {GGUF_PACK} names no ComfyUI-GGUF"))
        elif word == "FOLDER":
            words.append(str(folder / "to"))
        elif word == "~/ComfyUI":
            words.append(comfyui())
        else:
            words.append(str(ROOT) if word == HERE else word)
    if words[2:3] == ["bench"] and len(words) > 3:
        # `dev.py bench` installs the packages of others that are compared first, which most benchmarks do not need.
        words[1:4] = [str(ROOT / "benchmarks" / f"{words[3]}.py")]
    return words


def missing(command):
    """What a command needs that this machine has not; '' where it has all."""
    if command.startswith("git ") and not (ROOT / ".git").exists():
        return "this is no git repository"
    if command.endswith(" gpu") and (torch.backends.mps.is_available() or torch.xpu.is_available()):
        return "this machine has a GPU, which it would test for an hour"
    if command.endswith(" sim"):
        try:
            build.driver()
            package(VERSIONS[-1])
        except Unavailable as error:
            return str(error)
    return ""


def each():
    for command, how in RUN.items():
        yield pytest.param(command, how, marks=[pytest.mark.slow] * how.slow, id=command.removeprefix("python dev.py "))


@pytest.mark.parametrize(("command", "how"), each())
def test_a_command_of_the_pages_runs(command, how, folder):
    if how.comfyui:
        comfyui()
    if reason := missing(command):
        skip_loudly(f"`{command}`: {reason}")
    if "requirements.txt" in command:
        (folder / "custom_nodes" / "ComfyUI-Spillway").mkdir()
        shutil.copy(ROOT / "requirements.txt", folder / "custom_nodes" / "ComfyUI-Spillway")
    if command.split()[2:3] in (["demo"], ["sim"]):
        # Else they would write into the folder of whoever tests, and leave the model there.
        how = how._replace(adds=f"{how.adds} --checkpoint {folder / 'flux.safetensors'}")
        picture = "--image" if "--comfyui" in command else "--picture"
        how = how if "sim" in command else how._replace(adds=f"{how.adds} {picture} {folder / 'picture.png'}")
    environment = {**test_environment(), "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*in_place(command, folder), *how.adds.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    said = done.stdout + done.stderr
    assert how.code is None or done.returncode == how.code, said
    assert how.says in said, said
    if "git clone" in command:
        assert (folder / "custom_nodes" / "ComfyUI-Spillway" / "requirements.txt").is_file()
    if "convert" in command:
        where = folder / "to" if "--to" in command else folder
        assert {path.name for path in where.glob("*.safetensors")} >= {"model.safetensors"}
    if "requirements.txt" in command:
        assert "Would install" not in said


def test_a_benchmark_of_a_card_says_that_there_is_none():
    """`python dev.py bench card`, in the part of it that a machine without one can run."""
    comfyui()
    environment = {**test_environment(), "CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "benchmarks" / "card.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 2 and "no card" in done.stderr and "Traceback" not in done.stderr, done.stderr
