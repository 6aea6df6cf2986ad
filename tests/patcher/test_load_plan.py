"""The plan: what stays, what it costs to offload the rest, and where in the address order each bundle lies."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit.nets import quantise, steady
from spillway.ops.lending.bundle import Bundle
from spillway.ops.lending.param import Param
from spillway.patcher.load_plan import (
    SMALL_BYTES,
    LoadPlan,
    LoadState,
    bundles_ahead,
    interleave,
    plan_load,
    plan_unload,
)

UNIT = 1 << 20


@dataclass(eq=False)
class Sized:
    """What the plan reads of a bundle."""

    nbytes: int
    cost: int


def bundles(*units, cost=1):
    return [Sized(size * UNIT, size * UNIT * cost) for size in units]


def cost_of(bundle):
    return bundle.cost


# How much stays


def test_a_model_that_fits_is_full_and_needs_no_reserve():
    assert plan_load(bundles(5, 5), 10 * UNIT, bundles_ahead(2), cost_of) == LoadPlan(
        LoadState.FULL, 10 * UNIT, 0, 2, 0, 0
    )
    assert LoadState.FULL.value == "full"


def test_a_model_without_room_is_none():
    plan = plan_load(bundles(5, 5), 0, bundles_ahead(2), cost_of)
    assert plan.state is LoadState.NONE
    assert (plan.limit, plan.resident, plan.offloaded, plan.offloaded_bytes) == (0, 0, 2, 10 * UNIT)


def test_an_empty_model_is_full():
    assert plan_load([], 0, bundles_ahead(2), cost_of).state is LoadState.FULL


@pytest.mark.parametrize(("streams", "reserve"), [(0, 8), (1, 8 + 3), (2, 8 + 3 + 2), (9, 8 + 3 + 2 + 1)])
def test_the_reserve_sums_the_upcoming_bundles_and_does_not_multiply_the_largest(streams, reserve):
    plan = plan_load(bundles(3, 2, 8, 1), 0, bundles_ahead(streams), cost_of)
    assert plan.reserve == reserve * UNIT
    assert plan.reserve < 8 * UNIT * (1 + streams) or streams == 0


def test_the_reserve_counts_only_what_is_offloaded():
    """The large bundles stay, so the buffers are those of the small ones."""
    plan = plan_load(bundles(8, 8, 1, 1, 1, 1), 19 * UNIT, bundles_ahead(1), cost_of)
    assert plan == LoadPlan(LoadState.PARTIAL, 17 * UNIT, 2 * UNIT, 3, 3, 3 * UNIT)


def test_the_reserve_counts_what_an_offloaded_bundle_costs_and_not_its_size():
    plain, patched = (plan_load(bundles(*[1] * 20, cost=cost), 12 * UNIT, bundles_ahead(2), cost_of) for cost in (1, 3))
    assert plain.reserve == 3 * UNIT and plain.resident == 9
    assert patched.reserve == 9 * UNIT and patched.resident == 3


@steady
@given(
    sizes=st.lists(st.integers(1, 40), max_size=30),
    cost=st.integers(0, 4),
    streams=st.integers(0, 3),
    units=st.integers(0, 500),
)
def test_what_stays_and_the_buffers_of_the_rest_fit_the_budget(sizes, cost, streams, units):
    order = bundles(*sizes, cost=cost)
    plan = plan_load(order, units * UNIT, bundles_ahead(streams), cost_of)
    kept, rest = order[: plan.resident], order[plan.resident :]
    held = sum(bundle.nbytes for bundle in kept)
    buffers = sum(sorted((bundle.cost for bundle in rest), reverse=True)[: 1 + streams])
    assert plan.offloaded == len(rest) and plan.offloaded_bytes == sum(bundle.nbytes for bundle in rest)
    assert held <= plan.limit <= units * UNIT
    if kept:
        assert held + buffers <= units * UNIT
    assert plan.state is (LoadState.FULL if not rest else LoadState.PARTIAL if kept else LoadState.NONE)
    assert plan.reserve >= buffers or not kept


@steady
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), units=st.integers(0, 500), more=st.integers(1, 50))
def test_a_larger_budget_never_keeps_less(sizes, units, more):
    order = bundles(*sizes)
    smaller, larger = (plan_load(order, amount * UNIT, bundles_ahead(2), cost_of) for amount in (units, units + more))
    assert larger.resident >= smaller.resident


# How much to evict


def test_unloading_evicts_from_the_other_end_until_the_buffers_are_paid_too():
    order = bundles(4, 3, 2, 1)
    # 1 frees 1 and costs 1; with 2: frees 3, costs 3; with 3: 6 and 5 (two buffers); with 4: 10 and 7.
    assert plan_unload(order, 1 * UNIT, 0, bundles_ahead(1), cost_of) == 6 * UNIT
    assert plan_unload(order, 3 * UNIT, 0, bundles_ahead(1), cost_of) == 10 * UNIT


def test_buffers_that_are_reserved_already_cost_nothing_more():
    assert plan_unload(bundles(4, 3, 2, 1), 3 * UNIT, 7 * UNIT, bundles_ahead(1), cost_of) == 3 * UNIT


def test_unloading_nothing_evicts_nothing():
    assert plan_unload(bundles(4, 3), 0, 0, bundles_ahead(2), cost_of) == 0
    assert plan_unload([], 5 * UNIT, 0, bundles_ahead(2), cost_of) == 0


@steady
@given(sizes=st.lists(st.integers(1, 40), max_size=20), units=st.integers(0, 300), streams=st.integers(0, 3))
def test_unloading_frees_what_is_asked_or_everything(sizes, units, streams):
    order = bundles(*sizes)
    freed = plan_unload(order, units * UNIT, 0, bundles_ahead(streams), cost_of)
    suffixes = [sum(bundle.nbytes for bundle in order[index:]) for index in range(len(order) + 1)]
    assert freed in suffixes
    assert freed >= units * UNIT or freed == suffixes[0]


# What an offloaded bundle costs


def linear(dtype, form=None, compute=None, patched=False, shape=(256, 128)):
    module = torch.nn.Linear(1, 1, bias=False)
    parameter = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    param = Param(module, "weight", "weight", parameter, form or dtype, compute)
    param.set_patch(torch.neg if patched else None)
    return Bundle("linear", module, [param])


NUMEL = 256 * 128


@pytest.mark.parametrize(
    ("bundle", "cost"),
    [
        pytest.param(linear(torch.bfloat16), 2, id="plain: the bundle"),
        pytest.param(linear(torch.bfloat16, torch.float32), 2 + 4, id="cast: and its form"),
        pytest.param(linear(torch.float8_e4m3fn, torch.bfloat16), 1 + 2, id="fp8 cast"),
        pytest.param(linear(torch.bfloat16, patched=True), 2 + 2 * 2, id="patched: and twice the model dtype"),
        pytest.param(linear(torch.float8_e4m3fn, torch.bfloat16, patched=True), 1 + 2 * 2, id="both: not both"),
        pytest.param(linear(torch.float8_e4m3fn, compute=torch.bfloat16), 1 + 2, id="computed in another dtype"),
        pytest.param(linear(torch.float32, torch.float8_e4m3fn, torch.bfloat16), 4 + 2, id="stored small"),
    ],
)
def test_the_cost_of_offloading_counts_the_temporary_memory(bundle, cost):
    assert bundle.offload_cost() == cost * NUMEL


def test_a_quantised_bundle_costs_its_dequantised_form():
    module = torch.nn.Linear(1, 1, bias=False)
    wrapper = torch.nn.Parameter(quantise(torch.randn(256, 128)), requires_grad=False)
    bundle = Bundle("linear", module, [Param(module, "weight", "weight", wrapper, torch.float32)])
    assert bundle.offload_cost() == NUMEL + 256 * 4 + NUMEL * 4


# Where they lie


def runs(order, resident):
    """The longest stretch of the execution that is offloaded, in bytes."""
    longest = current = 0
    for bundle in order * 2:  # a step follows a step
        current = 0 if bundle in resident else current + bundle.nbytes
        longest = max(longest, current)
    return longest


def prefix(addresses, limit):
    kept = set()
    for bundle in addresses:
        limit -= bundle.nbytes
        if limit < 0:
            break
        kept.add(bundle)
    return kept


@steady
@given(
    pattern=st.lists(st.sampled_from([1, 2, 9, 12, 36]), min_size=1, max_size=6),
    repeats=st.integers(2, 60),
    share=st.integers(1, 9),
)
def test_any_prefix_of_the_addresses_is_spread_evenly_over_the_execution(pattern, repeats, share):
    order = bundles(*(pattern * repeats))
    total, largest = sum(bundle.nbytes for bundle in order), max(bundle.nbytes for bundle in order)
    kept = prefix(interleave(order, cost_of), total * share // 10)
    even = (total - sum(bundle.nbytes for bundle in kept)) / (len(kept) + 1)
    assert runs(order, kept) <= 2 * even + 2 * largest


@pytest.mark.parametrize("count", [12, 19, 37, 38, 57, 60, 100, 128, 304])
def test_equal_bundles_at_half_alternate(count):
    order = bundles(*[4] * count)
    kept = prefix(interleave(order, cost_of), count // 2 * 4 * UNIT)
    assert len(kept) == count // 2
    assert runs(order, kept) <= 2 * 4 * UNIT


@steady
@given(sizes=st.lists(st.integers(1, 100_000), max_size=40))
def test_every_bundle_lies_somewhere_once(sizes):
    order = [Sized(size, size) for size in sizes]
    addresses = interleave(order, cost_of)
    assert len(addresses) == len(order) and set(addresses) == set(order)


def test_small_bundles_lie_lowest():
    order = [Sized(size, size) for size in (SMALL_BYTES, 10, SMALL_BYTES * 9, SMALL_BYTES - 1, SMALL_BYTES)]
    assert [bundle.nbytes for bundle in interleave(order, cost_of)][:2] == [10, SMALL_BYTES - 1]
