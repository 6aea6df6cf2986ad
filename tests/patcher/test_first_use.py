"""The check of a device before its first model: what gives wrong bytes is found, and the model does without it."""

import json
import logging

import pytest
import torch

from kit.faulty_devices import AlwaysSame, BadMemory, DropsCopies, ForgetsWaits, LosesBytes, Sound, StalePins, TornPins
from kit.nets import AnyLinear, Stack, budget, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.int8 import linear
from spillway.ops.int8.weight import Int8Rows
from spillway.ops.vbar import software
from spillway.patcher import choose_vbar
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.first_use import check as first_use_check
from spillway.patcher.first_use.check import check, first_use, remember_failures
from spillway.patcher.first_use.verdict import COPIES, FP8, INSTEAD, INT8, PINNED, STREAMS, VBAR

ALL = 1 << 40
DEPTH = 6
EAGER = {"deferred": False, "eager": True, "overtaking": "some"}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    """Nothing is known of any device, and what a test finds is forgotten."""
    for name in ("_known", "_tried", "_refused"):
        monkeypatch.setattr(first_use_check, name, {})
    monkeypatch.setattr(linear, "_distrusted", set())
    monkeypatch.setattr(linear, "_kernels", {})
    monkeypatch.setattr(linear, "_kernel_names", {})


@pytest.fixture
def aimdo(monkeypatch):
    """``aimdo(kind)``: VBARs of that kind in the place of comfy-aimdo's."""

    def use(kind):
        for module in (first_use_check, choose_vbar):
            monkeypatch.setattr(module, "AimdoVBAR", kind)
            monkeypatch.setattr(module, "serves", lambda *_: (True, "it serves the simulated device"))

    return use


def break_int8():
    def off_by_one(x, qdata, scale, bias):
        products = (x.float() @ qdata.float().t() + 1) * scale[:, 0]
        return (products if bias is None else products + bias).to(x.dtype)

    linear.register_kernel("cpu", off_by_one, "a kernel that is off by one")


def break_int_mm(monkeypatch):
    right = torch._int_mm
    # The product that asks whether there is a kernel at all is right.
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b) + (a.shape != (32, 32)))


def break_fp8(monkeypatch):
    right = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **named: right(*args, **named) + 1)


class Linear(torch.nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)


def stepped_down(model):
    """What a model does without."""
    return {
        name
        for name, done in {
            PINNED: model._device.pageable,
            STREAMS: model._device.synchronous,
            VBAR: model.residency.remembered.aimdo_failure is not None,
            INT8: model.device in linear._distrusted,
        }.items()
        if done
    }


def said(model):
    return {name for name, words in INSTEAD.items() if any(words in text for text in model.ledger.decisions)}


def run_on(device, tmp_path, fraction=0.6, **policy):
    """Run a model with patches, pins and evictions eight times. Return it, and whether each run had the plain bits."""
    state = write(tmp_path / "m.safetensors", Stack(DEPTH))
    model = dynamic(lambda: Stack(DEPTH), tmp_path / "m.safetensors", device=device, pinned_bytes=ALL, **policy)
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction)))
    right = []
    for turn in range(4):
        factor = 1 + turn % 2
        model.set_patches(
            {f"layers.{index}.weight": lambda weight, f=factor: weight * f for index in range(0, DEPTH, 2)}
        )
        reference = plain(lambda: Stack(DEPTH), state, torch.float32)
        for layer in reference.layers[::2]:
            layer.weight.data = layer.weight.data * factor
        right += [same(model(reference.input()), reference(reference.input())) for _ in range(2)]
        model.free()
    return model, right


# -- a sound device


@pytest.mark.parametrize("eager", EAGER.values(), ids=EAGER)
def test_a_sound_device_steps_nothing_down(tmp_path, aimdo, eager):
    aimdo(Sound)
    device = SimDevice(eager=eager, name="sound")
    verdict = first_use(device)
    assert verdict.failed == {} and verdict.not_run == {}
    assert set(verdict.passed) == {COPIES, PINNED, STREAMS, VBAR, INT8, FP8}
    model, right = run_on(device, tmp_path)
    assert all(right) and stepped_down(model) == set() == said(model)
    assert model.vbar_kind == "aimdo"


def test_it_takes_less_than_a_second(aimdo):
    aimdo(Sound)
    assert min(check(SimDevice(name="sound")).seconds for _ in range(3)) < 1


def test_a_device_without_streams_is_checked_as_far_as_it_goes():
    verdict = first_use(SimDevice(streams=0, name="without streams"))
    assert verdict.failed == {} and STREAMS not in verdict.passed and PINNED in verdict.passed


def test_nothing_stays_on_the_device(aimdo):
    aimdo(Sound)
    device = SimDevice(name="sound")
    assert first_use(device).failed == {}
    assert device.held() == 0 and device.memory()[0] == device.capacity


def test_on_a_cpu_there_is_nothing_to_check(tmp_path, monkeypatch):
    monkeypatch.setattr(first_use_check, "check", None)  # calling it would raise, and be logged
    write(tmp_path / "m.safetensors", Stack(2))
    source = DiskMap(tmp_path / "m.safetensors")
    model = DynamicModel(Stack(2), source, "cpu", first_use_file=tmp_path / "first_use.json")
    model(model.module.input())
    assert first_use_check._known == {} and not (tmp_path / "first_use.json").exists()
    assert model.first_use().passed == []


# -- planted faults


TRANSFERS = {
    "a copy dropped": (DropsCopies, STREAMS),
    "no wait": (ForgetsWaits, STREAMS),
    "stale pins": (StalePins, PINNED),
    "torn pins": (TornPins, PINNED),
}


@pytest.mark.parametrize("fault", TRANSFERS)
def test_wrong_transfers_are_found_and_done_without(tmp_path, fault, caplog):
    kind, wanted = TRANSFERS[fault]
    assert not all(run_on(kind(), tmp_path)[1]), "without the check the fault does no harm: it tests nothing"
    with caplog.at_level(logging.WARNING):
        model, right = run_on(kind(name=fault), tmp_path)
    assert set(model.first_use().failed) == {wanted}
    assert stepped_down(model) == {wanted} == said(model)
    assert right == [True] * 8
    assert f"{fault} failed the check before its first use" in caplog.text and "bytes came back wrong" in caplog.text


@pytest.mark.parametrize("kind", [DropsCopies, ForgetsWaits])
def test_what_is_under_way_when_a_check_ends_has_its_memory(kind):
    device = kind(name="at fault")
    device.keeps_memory = False
    assert STREAMS in first_use(device).failed
    device.synchronize()  # a copy whose memory has gone would raise


@pytest.mark.parametrize("kind", [AlwaysSame, LosesBytes])
def test_a_vbar_that_does_not_keep_its_word_is_done_without(tmp_path, aimdo, kind):
    aimdo(kind)
    assert not all(run_on(SimDevice(), tmp_path, None)[1]), "without the check the fault does no harm: it tests nothing"
    model, right = run_on(SimDevice(name="with such a VBAR"), tmp_path, None)
    assert set(model.first_use().failed) == {VBAR}
    assert stepped_down(model) == {VBAR} == said(model)
    assert right == [True] * 8 and model.vbar_kind == "software"


def test_a_model_that_uses_a_software_vbar_does_not_check_the_other(tmp_path, aimdo):
    aimdo(AlwaysSame)
    model, right = run_on(SimDevice(name="with such a VBAR"), tmp_path, vbar="software")
    assert model.first_use().failed == {} and stepped_down(model) == set() and all(right)


@pytest.mark.parametrize("broken", ["a library's kernel", "torch's"])
def test_wrong_int8_products_are_computed_in_floating_point(tmp_path, monkeypatch, broken):
    break_int8() if broken == "a library's kernel" else break_int_mm(monkeypatch)
    state = write(tmp_path / "m.safetensors", Stack(1, layer=Linear))

    def run(name):
        model = dynamic(
            lambda: Stack(1, layer=Linear),
            tmp_path / "m.safetensors",
            device=SimDevice(name=name),
            quantise=lambda *_: Int8Rows(),
        )
        return model, model(model.module.input())

    qdata, scale = linear.quantise_rows(state["layers.0.weight"])
    reference = plain(lambda: Stack(1, layer=Linear), state, torch.float32)
    reference.layers[0].weight.data = linear.dequantise_rows(qdata, scale, torch.float32)
    wanted = reference(reference.input())
    assert not same(run(None)[1], wanted)
    model, result = run("such a device")
    assert set(model.first_use().failed) == {INT8}
    assert stepped_down(model) == {INT8} == said(model)
    assert same(result, wanted)


def test_an_int8_kernel_that_raises_is_done_without(monkeypatch):
    def refuses(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    linear.register_kernel("cpu", refuses, "a kernel of another device")
    assert "no kernel image" in first_use(SimDevice(name="x")).failed[INT8]


def test_wrong_fp8_products_are_found(monkeypatch):
    break_fp8(monkeypatch)
    verdict = first_use(SimDevice(name="x"))
    assert set(verdict.failed) == {FP8} and not verdict.trusts(FP8) and verdict.trusts(INT8)


def test_a_device_without_fp8_products_has_nothing_wrong(monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on devices with compute capability >= 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    verdict = first_use(SimDevice(name="x"))
    assert verdict.failed == {} and set(verdict.not_run) == {FP8}


def test_where_plain_copies_are_wrong_nothing_is_trusted(tmp_path, caplog):
    model, _ = run_on(BadMemory(name="bad memory"), tmp_path)
    assert COPIES in model.first_use().failed
    assert stepped_down(model) == {PINNED, STREAMS, VBAR, INT8} and COPIES in said(model)
    assert not model.first_use().trusts(FP8)


def test_every_model_of_the_device_does_without(tmp_path):
    device = DropsCopies(name="x")
    for _ in range(2):
        model, right = run_on(device, tmp_path)
        assert stepped_down(model) == {STREAMS} and all(right)


# -- it never raises


def test_a_device_that_is_full_is_checked_another_time(tmp_path, aimdo, monkeypatch):
    aimdo(Sound)
    monkeypatch.setattr(software, "POLL_SECONDS", 0)
    path = tmp_path / "first_use.json"
    device = SimDevice(1 << 20, name="full")
    assert set(first_use(device, path).not_run) == {VBAR}
    device.capacity = 1 << 30
    assert set(first_use(device, path).not_run) == {VBAR}, "not at once, as each model of a full device would try"
    monkeypatch.setattr(first_use_check, "RETRY_SECONDS", 0)
    assert VBAR in first_use(device, path).passed
    assert set(json.loads(path.read_text())["devices"]["full"]) == {
        COPIES,
        PINNED,
        STREAMS,
        VBAR,
        f"{INT8} by torch",
        FP8,
    }


@pytest.mark.parametrize("method", ["empty", "host_empty", "stream", "record", "copy", "synchronize", "identity"])
def test_a_device_that_refuses_everything_raises_in_its_use_alone(tmp_path, monkeypatch, method):
    def refuse(*_, **__):
        raise RuntimeError("simulated: refused")

    device = SimDevice(name="x")
    monkeypatch.setattr(device, method, refuse)
    verdict = first_use(device, tmp_path / "first_use.json")
    assert verdict.failed == {}


def test_a_folder_that_cannot_be_written_costs_the_memory_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    verdict = first_use(SimDevice(name="x"), tmp_path / "file" / "first_use.json")
    assert PINNED in verdict.passed and "cannot be written" in caplog.text


# -- the record


def test_what_was_found_is_kept_for_the_next_process(tmp_path, monkeypatch):
    path = tmp_path / "__spillway" / "first_use.json"
    found = first_use(DropsCopies(name="x"), path).failed
    assert set(found) == {STREAMS}
    monkeypatch.setattr(first_use_check, "_known", {})  # as in the next process
    monkeypatch.setattr(first_use_check, "check_copies", None)  # calling it would be in `not_run`
    sound = SimDevice(name="x")
    verdict = first_use(sound, path)
    assert verdict.failed == found and verdict.not_run == {} and sound.copies == 0
    model, right = run_on(DropsCopies(name="x"), tmp_path)
    assert stepped_down(model) == {STREAMS} and all(right)


def test_another_device_driver_or_version_is_checked_anew(tmp_path, monkeypatch):
    path = tmp_path / "first_use.json"
    first_use(DropsCopies(name="x, driver 1"), path)
    assert first_use(SimDevice(name="x, driver 2"), path).failed == {}
    assert set(json.loads(path.read_text())["devices"]) == {"x, driver 1", "x, driver 2"}


def test_another_kernel_is_checked_anew():
    device = SimDevice(name="x")
    assert first_use(device).failed == {}
    break_int8()
    copies = device.copies
    assert set(first_use(device).failed) == {INT8} and device.copies == copies


JUNK = {
    "nothing": b"",
    "no text": b"\xff\xfe\x00junk",
    "no object": b"[1, 2]",
    "no devices": b'{"devices": 3}',
    "no checks": b'{"devices": {"x": 3}}',
    "other values": b'{"devices": {"x": {"copies": true}}}',
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("junk", JUNK)
def test_junk_in_the_file_is_ignored_and_replaced(tmp_path, junk):
    path = tmp_path / "first_use.json"
    path.write_bytes(JUNK[junk])
    assert set(first_use(DropsCopies(name="x"), path).failed) == {STREAMS}
    found = json.loads(path.read_text())["devices"]["x"]
    assert found[PINNED] is None and "bytes came back wrong" in found[STREAMS]
    assert [entry.name for entry in tmp_path.iterdir()] == ["first_use.json"]


def test_a_failure_found_later_counts_and_a_later_success_does_not(tmp_path, monkeypatch):
    path = tmp_path / "first_use.json"
    sound, broken = SimDevice(name="x"), DropsCopies(name="x")
    assert first_use(sound, path).failed == {}
    remember_failures(broken, path, check(broken))
    assert set(first_use(sound, path).failed) == {STREAMS}
    remember_failures(sound, path, check(sound))
    monkeypatch.setattr(first_use_check, "_known", {})
    assert set(first_use(sound, path).failed) == {STREAMS}


def test_the_engine_passes_the_file_on(tmp_path):
    write(tmp_path / "m.safetensors", Stack(2))
    path = tmp_path / "first_use.json"
    model = DynamicModel(Stack(2, layer=AnyLinear), None, backend=SimDevice(name="x"), first_use_file=path)
    assert not path.exists()
    model(torch.zeros(1, 128))
    assert "x" in json.loads(path.read_text())["devices"]
