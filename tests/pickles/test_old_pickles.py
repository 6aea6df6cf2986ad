"""Files of before 2020, and what training programs write beside the weights: read without running any of it."""

import argparse
import os
import pathlib
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kit.nets import same
from kit.old_pickles import Made, Name, write_old
from kit.pickles import MARK, Calls
from spillway.ops.files.disk_map import SourceError
from spillway.ops.pickles.convert import convert
from spillway.ops.pickles.left_out import BESIDE_WEIGHTS

CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
FORMS = {
    "torch 0.1 on Python 2": {"rebuild": "_rebuild_tensor", "python": 2, "views": True},
    "torch 0.3 on Python 3": {"rebuild": "_rebuild_tensor"},
    "torch 1.0 on Python 2": {"python": 2},
    "torch 1.3": {},
    "from a card": {"location": "cuda:0"},
    "from a second card, Python 2": {"location": "cuda:1", "python": 2, "rebuild": "_rebuild_tensor"},
}


def weights():
    numbers = torch.Generator().manual_seed(3)
    base = torch.randn(6, 4, generator=numbers)
    return {
        "conv.weight": base,
        "conv.rows": base[2:5],
        "conv.turned": base.t(),
        "half": torch.randn(3, 5, generator=numbers).half(),
        "double": torch.randn(4, generator=numbers).double(),
        "norm.num_batches_tracked": torch.tensor(7),
        "whole": torch.arange(5, dtype=torch.int32),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }


def assert_converted(path, wanted):
    done = convert(path)
    found = load_file(done.path)
    assert set(found) == set(wanted) and all(same(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "with a number of steps"])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_an_older_torch(form, wrapped, tmp_path):
    wrap = (lambda state: {"state_dict": state, "epoch": 12, "arch": "resnet"}) if wrapped else (lambda state: state)
    path = write_old(tmp_path / "m.pth", weights(), wrap=wrap, **FORMS[form])
    assert not path.read_bytes().startswith(b"PK")
    assert_converted(path, weights())


def beside(python):
    """What is in a checkpoint of a training, but for its weights."""
    eight = struct.pack("<d", 0.87)  # no text in any encoding that is strict
    number = Made(
        "numpy.core.multiarray.scalar",
        Made("numpy.dtype", "f8", 0, 1, state=(3, "<", None, None, None, -1, -1, 0)),
        eight if python == 2 else Made("_codecs.encode", eight.decode("latin1"), "latin1"),
    )
    return {
        "epoch": 3,
        "best_prec1": number,
        "callbacks": {Name(CHECKPOINT): {"best_model_score": number, "dirpath": "checkpoints"}},
        "args": Made("argparse.Namespace", state={"lr": 0.1}),
        "place": Made("pathlib.PosixPath", "/", "tmp"),
    }


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("python", [2, 3])
def test_what_stands_beside_the_weights_of_an_older_file_is_left_out(python, allowed, tmp_path):
    path = write_old(
        tmp_path / "m.pth", weights(), python=python, wrap=lambda state: {"state_dict": state, **beside(python)}
    )
    kinds = [np.dtype, np.dtypes.Float64DType]  # ComfyUI allows these
    with torch.serialization.safe_globals(kinds if allowed else []):
        before = set(torch.serialization.get_safe_globals())
        assert_converted(path, weights())
        assert set(torch.serialization.get_safe_globals()) == before, "nothing of it is allowed to others, or taken"


def test_a_text_of_python_2_that_is_no_utf_8(tmp_path):
    path = write_old(
        tmp_path / "m.pt",
        weights(),
        python=2,
        wrap=lambda state: {"state_dict": state, "by": "Andr\xe9".encode("latin1")},
    )
    assert_converted(path, weights())


@pytest.fixture
def lightning(monkeypatch):
    """A class as that of a package that is not there when the file is read."""
    module, _, short = CHECKPOINT.rpartition(".")
    made = type(short, (), {"__module__": module})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[module], short, made)
    return made


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 2020"])
def test_what_stands_beside_the_weights_is_left_out(old, lightning, tmp_path, monkeypatch):
    """A Lightning checkpoint, as Stable Diffusion's was, with numbers of numpy, arguments and paths."""
    saved = {
        "state_dict": weights(),
        "callbacks": {lightning: {"best_model_score": np.float64(0.5), "last": np.int64(3)}},
        "hyper": argparse.Namespace(lr=0.1),
        "folder": pathlib.Path("/tmp"),
        "flag": np.bool_(True),
        "dtype": np.dtype("float32"),
    }
    torch.save(saved, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not old)
    for name in list(sys.modules):
        if name.startswith("pytorch_lightning"):
            monkeypatch.delitem(sys.modules, name)
    assert_converted(tmp_path / "m.ckpt", weights())
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


@pytest.mark.parametrize("name", BESIDE_WEIGHTS)
def test_each_of_them_is_known_by_its_name_and_nothing_is_imported(name, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(argparse, "Namespace", lambda *_, **__: called.append(1))
    path = write_old(
        tmp_path / "m.pt", weights(), wrap=lambda state: {"model": state, "it": Made(name), "kind": Name(name)}
    )
    before = set(sys.modules)
    assert_converted(path, weights())
    assert set(sys.modules) == before and not called


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 2020"])
def test_beside_what_is_left_out_a_program_is_refused_as_ever(old, lightning, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    for call in (Calls(os.system, f"echo > {tmp_path / MARK}"), Calls(eval, f"open({str(tmp_path / MARK)!r}, 'w')")):
        saved = {"state_dict": weights(), "callbacks": {lightning: np.float64(0.5)}, "more": call}
        torch.save(saved, tmp_path / "m.ckpt", _use_new_zipfile_serialization=not old)
        with pytest.raises(SourceError, match=r"asks to call '[\w.]*(system|eval)'.*was not run"):
            convert(tmp_path / "m.ckpt")
        assert os.listdir(tmp_path) == ["m.ckpt"] and set(torch.serialization.get_safe_globals()) == before


def test_arrays_of_numpy_are_refused_as_they_may_be_weights(tmp_path):
    torch.save({"a": torch.zeros(2), "b": np.ones(3)}, tmp_path / "m.pt")
    with pytest.raises(SourceError, match=r"asks to call 'numpy\.\w*core\.multiarray\._reconstruct'"):
        convert(tmp_path / "m.pt")


def test_a_pickle_that_torch_did_not_write_is_named(tmp_path):
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"a": [1.0, 2.0]}, protocol=2))
    with pytest.raises(SourceError, match=r"m\.pt: torch cannot read this file as a pickle of tensors"):
        convert(tmp_path / "m.pt")
