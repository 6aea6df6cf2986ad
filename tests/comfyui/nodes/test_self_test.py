"""The node that tests a device: it finds nothing wrong on a sound one, and says what is wrong on another."""

import json
import math
from pathlib import Path

import folder_paths
import pytest
import torch

from kit.comfyui.on_device import wants_aimdo
from spillway.nodes import self_test as node
from spillway.nodes.self_test import SpillwaySelfTest
from spillway.ops.device.backend import backend_for
from spillway.patcher import self_test
from spillway.patcher.dynamic_model import DynamicModel, models
from spillway.patcher.first_use import check


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(self_test, "WIDTH_ON_CPU", 64)
    monkeypatch.setattr(self_test, "WIDTH", 64)


def test_a_sound_device_gives_the_plain_bits_at_any_residency():
    before = set(models)
    words, path = SpillwaySelfTest.execute(device="current").args
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    assert found["ok"] and found["check"]["nothing_to_check"] == (found["device"] == "cpu")
    kinds = ["aimdo", "software"] if wants_aimdo() else ["software"]
    assert [(run["vbar"], run["share"]) for run in found["model"]] == [(k, n) for k in kinds for n in (1.0, 0.5, 0.0)]
    assert all(run["same_bits"] and run["decisions"] for run in found["model"])
    streamed = [run["streamed_bytes"] for run in found["model"]]
    assert all(streamed[at] == 0 < streamed[at + 1] for at in range(0, len(streamed), 3))
    assert streamed[-2] < streamed[-1], "half fits where pieces are small enough"
    assert "all is well" in words and words.count("the plain module's bits") == len(streamed) and path in words
    assert path.startswith(folder_paths.get_user_directory()) and torch.__version__ in words
    assert set(models) == before, "nothing stays loaded"


def test_a_model_that_computes_something_else_is_told(monkeypatch):
    call = DynamicModel.__call__
    monkeypatch.setattr(DynamicModel, "__call__", lambda self, x: call(self, x) + (self.policy.vram_bytes == 0))
    words, path = SpillwaySelfTest.execute(device="cpu").args
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    assert not found["ok"] and [run["same_bits"] for run in found["model"]] == [True, True, False]
    assert "SOMETHING IS WRONG" in words and words.count("OTHER BITS") == 1


def test_what_a_check_finds_is_told(monkeypatch):
    def broken():
        raise check.Wrong("pinned memory: 3 of 513 bytes came back wrong")

    kind = type(backend_for(node.comfy.model_management.get_torch_device()))
    monkeypatch.setattr(kind, "identity", lambda self: "a card of the future")
    monkeypatch.setattr(check, "_known", {"a card of the future": {"pinned memory": None}})  # checked anew all the same
    monkeypatch.setattr(check, "_checks", lambda *_: {"copies": lambda: None, "pinned memory": broken})
    words, path = SpillwaySelfTest.execute(device="current").args
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    assert not found["ok"] and found["check"]["passed"] == ["copies"]
    assert "FAILED pinned memory: pinned memory: 3 of 513 bytes" in words and "a card of the future" in words


def test_it_can_be_stopped(monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(node.comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(KeyboardInterrupt):
        SpillwaySelfTest.execute(device="current")


def test_an_unknown_device_is_refused_and_every_prompt_runs_it_again():
    with pytest.raises(ValueError, match="there is no device 'cuda:9' here"):
        SpillwaySelfTest.execute(device="cuda:9")
    assert math.isnan(SpillwaySelfTest.fingerprint_inputs(device="current"))
