"""An output is found by the same ComfyUI alone: version, code, device, flags, torch and pack."""

import enum
import os

import comfy.model_management
import comfyui_version
import nodes
import pytest
import torch
from comfy.cli_args import args

from kit.comfyui.executor import ALL, Executor, prompt
from spillway.cache.comfyui import disk
from spillway.cache.comfyui import stamps as comfy_stamps
from spillway.ops.device import identity

pytestmark = pytest.mark.usefixtures("installed", "tier")


@pytest.fixture(autouse=True)
def fresh():
    def forget():
        disk._versions.cache_clear()
        comfy_stamps.comfyui_digest.cache_clear()
        comfy_stamps.own_digest.cache_clear()
        disk.packages.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture
def written(monkeypatch, evict):
    monkeypatch.setattr(comfy_stamps, "_sources", {})
    first = Executor()
    first.run(prompt())
    evict(first)


FLAGS = [
    *("force_fp32", "force_fp16", "fp16_unet", "bf16_unet", "fp8_e4m3fn_unet", "fp32_vae", "bf16_vae", "cpu_vae"),
    *("fp8_e4m3fn_text_enc", "fp16_text_enc", "fp16_intermediates", "force_upcast_attention", "deterministic"),
    *("use_split_cross_attention", "disable_xformers", "a_flag_of_a_later_version"),
]


def flag(name):
    """Return what sets a flag to what it is not: this ComfyUI may run with it."""
    return lambda patch: patch.setattr(args, name, not getattr(args, name, False), raising=False)


OTHER = {
    **{name: flag(name) for name in FLAGS},
    "fast": lambda patch: patch.setattr(args, "fast", {"fp16_accumulation"}),
    "ComfyUI": lambda patch: patch.setattr(comfyui_version, "__version__", "99.0"),
    "ComfyUI's code": lambda patch: patch.setattr(disk, "comfyui_digest", lambda: "other"),
    "the pack's code": lambda patch: patch.setattr(disk, "own_digest", lambda: "other"),
    "device": lambda patch: patch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu", 0)),
    "card": lambda patch: patch.setattr(identity, "device_name", lambda _: "another card"),
    "driver": lambda patch: patch.setattr(identity, "driver_version", lambda _: "another driver"),
    "processor": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "99.0"),
    "pack": lambda patch: patch.setattr(identity, "pack_version", lambda: "99.0"),
    "comfy-kitchen": lambda patch: patch.setattr(disk, "installed", lambda _: "99.0"),
}


def test_the_same_is_found_by_any_server(written, monkeypatch, fresh):
    fresh()
    for name, value in (
        ("port", 1),
        ("cuda_device", "1"),
        ("output_directory", "/tmp"),
        ("cache_ram", [3.0]),
        ("verbose", "DEBUG"),
    ):
        monkeypatch.setattr(args, name, value)
    assert Executor().run(prompt()) == ["Save"]


@pytest.mark.parametrize("what", OTHER)
def test_another_one_finds_nothing(written, monkeypatch, fresh, what):
    fresh()
    OTHER[what](monkeypatch)
    assert sorted(Executor().run(prompt())) == sorted(ALL)


@pytest.mark.parametrize("tier", ["disk"], indirect=True)
def test_other_packages_find_nothing(written, monkeypatch, fresh, tmp_path):
    """Those that a text encoder's tokenizer comes from, or that a node of another pack computes with."""
    site = tmp_path / "site"
    (site / "tokens-1.0.dist-info").mkdir(parents=True)
    os.utime(site / "tokens-1.0.dist-info", (1000, 1000))
    monkeypatch.syspath_prepend(str(site))
    fresh()
    assert sorted(Executor().run(prompt())) == sorted(ALL)


@pytest.mark.parametrize("tier", ["disk"], indirect=True)
def test_packages_that_came_after_the_start(monkeypatch, tmp_path, caplog, fresh):
    (tmp_path / "site" / "tokens-1.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    fresh()
    executor = Executor()
    assert sorted(executor.run(prompt())) == sorted(ALL)
    assert executor.cache.disk is None and "packages of this Python have changed since this one" in caplog.text


def test_flags_are_written_alike_in_every_process(monkeypatch):
    """A set is listed in another order in each."""
    kind = enum.Enum("kind", "a b c d e f")
    monkeypatch.setattr(args, "fast", {*kind})
    assert disk._flags()["fast"] == [f"kind.{name}" for name in "abcdef"]


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """Something like ComfyUI's folder, and a function that hashes it."""
    root = tmp_path / "comfyui"
    for name in (
        "nodes.py",
        "comfy/tokens.json",
        "comfy/ldm/model.py",
        "comfy_extras/nodes_x.py",
        "custom_nodes/pack/x.py",
        "input/x.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x = 1")
    monkeypatch.setattr(nodes, "__file__", str(root / "nodes.py"))

    def digest():
        comfy_stamps.comfyui_digest.cache_clear()
        monkeypatch.setattr(comfy_stamps, "STARTED", 1 << 62)
        return comfy_stamps.comfyui_digest()

    return root, digest


@pytest.mark.parametrize("name", ["nodes.py", "comfy/tokens.json", "comfy/ldm/model.py", "comfy_extras/nodes_x.py"])
def test_code_of_comfyui_that_changes_without_its_version(comfyui, name):
    root, digest = comfyui
    before = digest()
    os.utime(root / name, (1000, 1000))
    for other in ("custom_nodes/pack/x.py", "input/x.py"):
        (root / other).write_text("x = 2")
    assert before and digest() == before, "its content counts, not its time, and not what is not ComfyUI's"
    (root / name).write_text("x = 2")
    assert digest() != before


def test_code_of_comfyui_that_changed_after_the_start(comfyui, monkeypatch, caplog):
    """What runs is then in no file any more."""
    comfyui[1]()
    comfy_stamps.comfyui_digest.cache_clear()
    monkeypatch.setattr(comfy_stamps, "STARTED", 0)
    executor = Executor()
    assert sorted(executor.run(prompt())) == sorted(ALL)
    assert (
        executor.cache.disk is executor.cache.sharing.store is None
        and "files of ComfyUI have changed since this one" in caplog.text
    )
