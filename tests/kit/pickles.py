"""Pickles as people find them: models in every form that torch.save writes, and files that want to run something."""

import builtins
import io
import os
import pickle
import tarfile
import zipfile

import torch

MARK = "executed"  # a file that any of the malicious ones would leave behind


class Calls:
    """Pickles itself as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def model(seed=0, old=False):
    """{key: tensor} with tensors that share numbers, transposed ones, scalars, empty ones and several dtypes.

    old: only dtypes that torch had in 2020.
    """
    numbers = torch.Generator().manual_seed(seed)
    base = torch.randn(8, 6, generator=numbers)
    newer = {} if old else {"eight": torch.randn(4, 4, generator=numbers).to(torch.float8_e4m3fn)}
    return {
        **newer,
        "base": base,
        "rows": base[2:5],
        "transposed": base.t(),
        "column": base[:, 1],
        "tied": base,
        "half": torch.randn(5, 3, generator=numbers).to(torch.bfloat16),
        "whole": torch.arange(7),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=numbers)),
        "expanded": torch.randn(4, 1, generator=numbers).expand(4, 3),
        "steps": 7,
        "name": "a model",
    }


def forms(tensors):
    """How programs wrap a state dict: name -> what is saved."""
    return {
        "plain": tensors,
        "state_dict": {"state_dict": tensors, "epoch": 3, "optimizer": {"lr": 0.1}},
        "only entry": {"anything": tensors},
        "model": {"model": tensors, "optimizer": {"lr": 0.1}},
        "parallel": {f"module.{key}": value for key, value in tensors.items()},
        "params_ema": {"params": {"old": torch.zeros(1)}, "params_ema": tensors, "iteration": 5},
        "embedding": {"string_to_param": tensors, "string_to_token": {"*": 265}, "name": "x", "step": None},
    }


def malicious(folder):
    """name -> (bytes of a file that would make MARK in `folder` if it were run, what its refusal says)."""
    mark = os.path.join(folder, MARK)
    shell, code = f"echo > {mark}", f"open({mark!r}, 'w').close()"
    system = Calls(os.system, shell)
    inner = pickle.dumps(Calls(builtins.exec, code))
    evil = {
        "os.system": (system, r"\w+\.system"),
        "eval": (Calls(builtins.eval, code), "eval"),
        "exec": (Calls(builtins.exec, code), "exec"),
        "nested": (Calls(pickle.loads, inner), "loads"),
        "among tensors": ({"state_dict": {"a": torch.zeros(2), "b": system}}, r"\w+\.system"),
        "getattr": (Calls(builtins.getattr, "", "join"), "getattr"),
        "open": (Calls(builtins.open, mark, "w"), "open"),
        # Two lines of text that take a gigabyte of zeros. torch's own reader makes them.
        "bytes out of nothing": (Calls(builtins.bytearray, 1 << 30), "bytearray"),
    }
    files = {}
    for name, (thing, words) in evil.items():
        files[name] = (_saved({"a": torch.zeros(2), "b": thing}), words)
        files[f"{name}, old format"] = (_saved({"a": torch.zeros(2), "b": thing}, old=True), words)
        files[f"{name}, bare"] = (pickle.dumps(thing), "cannot read this file|" + words)
    files["tar"] = (_tar(pickle.dumps(system)), r"tar archive|cannot read this file")
    files["TorchScript"] = (_torch_script(), "TorchScript")
    files["compressed"] = (compressed(_saved(model())), "zip bomb")
    files["bomb"] = (_bomb(), "zip bomb")
    files["repeated"] = (_saved({"a": torch.zeros(1).expand(1 << 30)}), "repeat the same numbers")
    return files


def _saved(value, old=False):
    data = io.BytesIO()
    torch.save(value, data, _use_new_zipfile_serialization=not old)
    return data.getvalue()


def _tar(pickled):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return data.getvalue()


def _torch_script():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        archive.writestr("archive/code/__torch__.py", b"def forward(self): pass")
    return data.getvalue()


def compressed(saved):
    """The same archive with its entries deflated."""
    data = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved)) as old, zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return data.getvalue()


def _bomb():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (50 << 20))
    return data.getvalue()
