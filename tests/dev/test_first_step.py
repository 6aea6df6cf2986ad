"""A first step on the virtual clock: what it waits for, and what it brings in an order that was guessed wrong."""

from contextlib import contextmanager
from unittest.mock import patch

from kit.virtual.backend import VirtualBackend
from kit.virtual.clock import TO_HOST, Clock, Costs
from kit.virtual.devices import MACHINES
from kit.virtual.layers import Block, Linear, Model, Norm
from kit.virtual.math import LowRankPatch, virtual_math
from kit.virtual.models import MODELS
from spillway.ops.lending import device_caster
from spillway.ops.lending.device_caster import DeviceCaster
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

MACHINE = MACHINES["4090 24GB gen4x16"]
WIDTH, TOKENS = 2048, 8192
DEPTH = 24


def block(order):
    """A block with little layers between large ones, registered in another order than that in which it runs."""
    layers = {name: Linear(WIDTH, WIDTH, TOKENS, bias=False) for name in ("out", "into", "mid")}
    layers |= {f"norm{index}": Norm(WIDTH, TOKENS * WIDTH) for index in range(4)}
    return Block(layers, order)


ORDER = ("norm3", "into", "norm2", "norm1", "mid", "norm0", "out")


@contextmanager
def virtual(parts, patched=False, **policy):
    """Yields (model, clock), with all of it pinned where it does not stay."""
    clock = Clock(MACHINE, Costs(0.0, 0.0, 0.0), hazards=True)
    model = parts if isinstance(parts, Model) else Model("Blocks", parts)
    backend = VirtualBackend(clock)
    with virtual_math(clock), patch("spillway.patcher.dynamic_model.room_for_pins", lambda: 1 << 40):
        dynamic = DynamicModel(model, policy=Policy(pinned_bytes=1 << 40, **policy), backend=backend)
        model.run_on(clock, "bf16")
        if patched:
            wide = [f"{name}.weight" for name, module in model.holders() if isinstance(module, Linear)]
            dynamic.set_patches({key: LowRankPatch() for key in wide})
        try:
            yield dynamic, clock
        finally:
            dynamic.close()


def first_step(dynamic, clock):
    before = clock.main.at
    dynamic(None)
    clock.wait_until(clock.main.at)
    return clock.main.at - before


def blocks(count=DEPTH, name="blocks", order=ORDER):
    return {f"{name}.{index}": block(order) for index in range(count)}


def test_what_is_made_on_the_way_is_not_waited_for_until_it_lies_in_its_pin():
    layers = {f"{index}": Linear(4096, 4096, 2048, bias=False) for index in range(DEPTH)}
    with virtual(layers, patched=True, vram_bytes=0) as (dynamic, clock):
        took, sums = first_step(dynamic, clock), clock.sums
        assert dynamic.ledger.counters.write_backs
        limit = max(sums.compute_s, sums.bytes_in / MACHINE.bus, sums.bytes_read / MACHINE.memcpy_all)
        assert took <= 1.1 * limit


def test_what_is_brought_does_not_wait_behind_what_is_written_back():
    used, transfer = {True: set(), False: set()}, Clock.transfer

    def noted(self, nbytes, stream, way, *rest):
        used[way == TO_HOST].add(stream)
        return transfer(self, nbytes, stream, way, *rest)

    with virtual(blocks(), patched=True, vram_bytes=0) as (dynamic, clock), patch.object(Clock, "transfer", noted):
        first_step(dynamic, clock)
    assert used[True] and used[False] and not used[True] & used[False]


def test_what_is_on_its_way_in_a_wrong_order_stays_for_its_use():
    kept, doubt = [], DeviceCaster.doubt

    def noted(self, bundle):
        before = list(self.prefetched)
        doubt(self, bundle)
        kept.append((before, list(self.prefetched)))

    with virtual(blocks(), vram_bytes=0) as (dynamic, clock), patch.object(DeviceCaster, "doubt", noted):
        first_step(dynamic, clock)
    assert any(before for before, _ in kept)
    assert all(before == after for before, after in kept)


def test_what_is_wanted_does_not_queue_behind_a_wrong_guess():
    """A first step of a real model, all of which stays, is shorter than where as much is begun as in a known order."""
    took = []
    for limit in (device_caster.GUESSED_AHEAD, 1 << 40):
        with (
            patch.object(device_caster, "GUESSED_AHEAD", limit),
            virtual(MODELS["Z-Image 1024"]()) as (dynamic, clock),
        ):
            took.append(first_step(dynamic, clock))
    assert took[0] < 0.97 * took[1]


def test_blocks_of_another_name_are_guessed_alike():
    doubted, doubt = [], DeviceCaster.doubt

    def noted(self, bundle):
        doubted.append(bundle.name)
        doubt(self, bundle)

    parts = blocks(4, "first") | blocks(4, "second")
    with virtual(parts, vram_bytes=0) as (dynamic, clock), patch.object(DeviceCaster, "doubt", noted):
        first_step(dynamic, clock)
    assert [name for name in doubted if name.startswith("second")] == ["second.0.norm3"]
