"""The check of a device before its first model, on real comfy-aimdo."""

import pytest
import torch

from kit.nets import Stack, dynamic, plain, same, write
from spillway.ops.vbar.aimdo import AimdoVBAR
from spillway.patcher.first_use import check as first_use_check
from spillway.patcher.first_use.check import check, first_use
from spillway.patcher.first_use.verdict import COPIES, FP8, INT8, PINNED, STREAMS, VBAR


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(first_use_check, "_known", {})


def test_a_sound_device_passes_and_gets_everything_back(machine, device):
    device.name = "sound"
    verdict = check(device)
    assert verdict.failed == {} and verdict.not_run == {}
    assert verdict.passed == [COPIES, PINNED, STREAMS, VBAR, INT8, FP8]
    assert verdict.seconds < 5  # an upper bound for a busy machine


def test_a_full_device_is_checked_as_far_as_there_is_room(machine, device):
    device.name = "full"
    machine.leave_pages(1)
    verdict = check(device)
    assert verdict.failed == {} and set(verdict.not_run) == {VBAR}


def test_a_vbar_that_says_of_every_slice_that_its_bytes_are_there_is_done_without(
    machine, device, tmp_path, monkeypatch
):
    monkeypatch.setattr(AimdoVBAR, "same", lambda self, signature, other: other is not None)
    build = lambda: Stack(9, 1024)  # noqa: E731 - nine bundles of 4 MiB
    state = write(tmp_path / "m.safetensors", build())
    reference = plain(build, state, torch.float32)
    wanted = reference(reference.input())

    def run(name):
        device.name = name
        model = dynamic(build, tmp_path / "m.safetensors", device=device, headroom_bytes=0)
        right = []
        for _ in range(3):
            right.append(same(model(reference.input()), wanted))
            model.free()
            # What lay in the pages is gone, as where another program has had them.
            machine.aimdo.others_take(machine.driver.get("capacity"))
            machine.leave_pages(100)
        kind, words = model.vbar_kind, " ".join(model.ledger.decisions)
        model.close()
        return right, kind, words

    assert not all(run(None)[0]), "without the check the fault does no harm: it tests nothing"
    right, kind, words = run("with such a VBAR")
    assert set(first_use(device).failed) == {VBAR}
    assert all(right) and kind == "software" and "failed the check before its first use" in words
