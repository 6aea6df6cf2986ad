"""The peers of `bench schedule` and its limits, on a model of equal blocks where each schedule can be told by hand."""

import sys

import pytest

from kit.environment import ROOT
from kit.virtual.devices import GIB, MACHINES

sys.path.append(str(ROOT / "benchmarks"))
from virtual.limits import limits
from virtual.peers import PEERS, Accelerate, ComfyUI, Diffusers, Mmgp, RamTorch
from virtual.rows import Case, Runner
from virtual.work import Group, Op, Work

MACHINE = MACHINES["4090 24GB gen4x16"]
BLOCK = 100_000_000
BUS, PAGEABLE = BLOCK / MACHINE.bus, BLOCK / MACHINE.pageable
FAST, SLOW = BUS / 4, 4 * BUS  # what a block computes


def work(seconds, count=40):
    ops = [Op(f"blocks.{index}.0", BLOCK, BLOCK, 1, seconds, 0.0, 0.0, BLOCK) for index in range(count)]
    return Work([Group(f"blocks.{index}", [op], True) for index, op in enumerate(ops)])


def took(peer, seconds, share, ram_gb=64):
    model = work(seconds)
    return peer(model, MACHINE, ram_gb, int(model.nbytes * share)).seconds() / len(model.groups)


@pytest.mark.parametrize("seconds", [FAST, SLOW])
def test_nobody_is_faster_than_the_hardware(seconds):
    for share in (0.0, 0.3, 0.7, 1.0):
        for ram_gb in (6, 64):
            model = work(seconds)
            least = limits(model, MACHINE, ram_gb, int(model.nbytes * share)).step / len(model.groups)
            for peer in PEERS:
                # The first block of a step may have come in the one before.
                assert took(peer, seconds, share, ram_gb) >= least * 0.97, (peer.name, share, ram_gb)


@pytest.mark.parametrize("peer", [ComfyUI, Mmgp, Accelerate, RamTorch])
def test_what_fits_is_not_brought_again(peer):
    assert took(peer, FAST, 1.0) == pytest.approx(FAST, rel=1e-3)


@pytest.mark.parametrize("peer", [ComfyUI, Diffusers, Mmgp, RamTorch])
def test_those_that_bring_ahead_take_the_longer_of_both(peer):
    assert took(peer, FAST, 0.0) == pytest.approx(BUS, rel=0.05)
    assert took(peer, SLOW, 0.0) == pytest.approx(SLOW, rel=0.05)


def test_accelerate_overlaps_nothing_and_keeps_the_first_modules():
    assert took(Accelerate, SLOW, 0.0) == pytest.approx(SLOW + PAGEABLE, rel=0.01)
    assert took(Accelerate, SLOW, 0.5) == pytest.approx(SLOW + PAGEABLE / 2, rel=0.05)


def test_contiguous_residency_waits_for_the_bus_where_spread_residency_does_not():
    seconds = BUS * 0.6  # half of the blocks resident: spread evenly, each transfer has two computations to hide behind
    assert took(ComfyUI, seconds, 0.6) > 1.2 * seconds
    assert took(Mmgp, seconds, 0.6) < 1.1 * seconds
    assert took(RamTorch, seconds, 0.6) < 1.1 * seconds


def test_limits_follow_what_has_no_place():
    model = work(0.0)
    half = model.nbytes // 2
    least = limits(model, MACHINE, 64, half)
    assert least.step == pytest.approx(half / MACHINE.bus) and least.pinned == half
    assert least.first == pytest.approx(model.nbytes / min(MACHINE.bus, MACHINE.memcpy_all))
    short = limits(model, MACHINE, 5, half)  # 1 GB of RAM for weights, of which pins leave half to others
    assert short.pinned == GIB // 2
    assert short.step == pytest.approx((half - GIB // 2) / MACHINE.disk)
    assert short.first == pytest.approx(model.nbytes / MACHINE.disk)


def test_a_first_step_that_patches_waits_for_no_pin_where_nothing_is_to_stay():
    """Both ways of the bus are busy all the time then. One after the other, it would take 1.22 of its limit."""
    row = Runner().row(Case("Gemma 12B", "4060Ti 16GB gen4x8", 32, "bf16", True, 0.0))
    assert row["first_over_limit"] <= 1.1
