"""A file that is cut or overwritten between its opening and any reading is an error that names it, never a SIGBUS."""

import os
import shutil

import pytest

from kit.comfyui.fresh_process import run_script

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody change a mapped file")
LARGE = {"hidden": 512, "depth": 1, "depth_single": 1}  # some tensors are saved in parts


@pytest.mark.parametrize("what", ["cut", pytest.param("overwritten", marks=pytest.mark.slow)])
def test_every_reader_names_the_file(what, checkpoint, quantised_file, tmp_path):
    flux = checkpoint("flux", **LARGE)
    files = {
        "flux": flux,
        "base": checkpoint("flux", seed=1, **LARGE),
        "clip": checkpoint("clip_l"),
        "vae": checkpoint("flux_vae"),
        "checkpoint": checkpoint("sd15"),
        "quantised": quantised_file("float8_e4m3fn"),
    }
    for name, path in files.items():
        shutil.copy(path, tmp_path / f"{name}.safetensors")
    found = run_script("cut_files.py", str(tmp_path), what)
    for reader, said in found["said"].items():
        if reader == "header":  # it is read after the change, as that of the file that is there
            assert said == "done" if what == "overwritten" else "changes.safetensors: truncated" in said
            continue
        assert said.startswith("FileChanged ") and "changes.safetensors: this file was" in said, (reader, said)
    assert found["left"] == []
