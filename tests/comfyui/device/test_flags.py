"""ComfyUI's options about streams, page-locking and reserved VRAM hold for our models too."""

import comfy.model_management as management
import pytest
from comfy.cli_args import args

from spillway.ops.device.backend import Backend, StreamBackend
from spillway.patcher.comfyui import flags
from spillway.patcher.headroom import default_headroom
from spillway.patcher.ram_pressure import room_for_pins

GIB = 1 << 30


@pytest.fixture
def backend():
    return StreamBackend(management.get_torch_device())


@pytest.mark.parametrize(
    ("given", "streams"),
    [({}, 2), ({"async_offload": 1}, 1), ({"async_offload": 5}, 2), ({"disable_async_offload": True}, 0)],
)
def test_streams(monkeypatch, backend, given, streams):
    for name, value in {"async_offload": None, "disable_async_offload": False, **given}.items():
        monkeypatch.setattr(args, name, value)
    assert flags.heed_flags(backend).streams == streams
    assert StreamBackend.streams == 2  # of other devices


@pytest.mark.parametrize("disabled", [False, True])
def test_page_locking(monkeypatch, backend, disabled):
    monkeypatch.setattr(args, "disable_pinned_memory", disabled)
    locked = []
    monkeypatch.setattr(backend, "_lock", lambda address, nbytes: locked.append(nbytes))
    monkeypatch.setattr(backend, "_unlock", lambda address: True)
    assert flags.heed_flags(backend).host_empty(4096).numel() == 4096
    assert bool(locked) != disabled


def test_reserved_vram(monkeypatch, backend):
    monkeypatch.setattr(args, "reserve_vram", None)
    before = default_headroom(flags.heed_flags(backend))
    monkeypatch.setattr(args, "reserve_vram", 5.0)
    assert default_headroom(flags.heed_flags(backend)) == 5 * GIB > before
    assert Backend.reserved == 0


def test_pins_leave_what_comfyui_has_locked(monkeypatch):
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", 3 * GIB)
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 2 * GIB)
    before = flags.room_beside_comfyui()
    assert 0 <= before <= GIB and room_for_pins() <= before
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 4 * GIB)
    assert flags.room_beside_comfyui() == room_for_pins() == 0
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", -1)
    assert flags.room_beside_comfyui() > GIB
