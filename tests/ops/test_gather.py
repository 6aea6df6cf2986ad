"""Gathering: several tensors in one aligned buffer and back, bit for bit."""

import gc
import itertools
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kit.nets import bits, quantise, same, steady
from spillway.ops.gather import (
    ALIGNMENT,
    aligned,
    copy_into,
    gathered_bytes,
    inner_tensors,
    interpret_gathered_like,
    like,
    tensor_bytes,
)

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.bool)


def gather(tensors, spare=0):
    """A buffer filled through the views, as the caster fills it and, to the same bytes, as a reader alone does."""
    filled = []
    for alone in (False, True):
        buffer = torch.full((gathered_bytes(tensors) + spare,), 0xFF, dtype=torch.uint8)
        for view, tensor in zip(interpret_gathered_like(tensors, buffer), tensors, strict=True):
            if tensor is not None:
                copy_into(view, tensor, alone=alone)
        filled.append(buffer)
    assert torch.equal(*filled)
    return filled[0]


def all_bits(dtype):
    """Every bit pattern of an 8-bit dtype, and as many of a wider one."""
    values = torch.arange(256, dtype=torch.uint8).repeat(dtype.itemsize)
    return values % 2 == 0 if dtype is torch.bool else values.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_round_trip_keeps_every_bit_of_every_dtype(dtype):
    tensors = [all_bits(dtype), all_bits(dtype)[:7].view(7, 1)]
    back = interpret_gathered_like(tensors, gather(tensors))
    assert all(same(a, b) for a, b in zip(back, tensors, strict=True))


def test_none_scalars_and_empty_tensors_keep_their_places():
    tensors = [None, torch.tensor(3.5), torch.empty(0, 4), None, torch.tensor([True])]
    back = interpret_gathered_like(tensors, gather(tensors))
    assert back[0] is None and back[3] is None
    assert all(same(back[index], tensors[index]) for index in (1, 2, 4))


def test_nothing_to_gather_needs_no_bytes():
    assert gathered_bytes([]) == gathered_bytes([None, torch.empty(0)]) == 0
    assert interpret_gathered_like([None], torch.empty(0, dtype=torch.uint8)) == [None]


def test_a_tensor_that_is_not_contiguous_is_gathered_by_value():
    tensors = [torch.arange(12.0).view(3, 4).t()]
    (back,) = interpret_gathered_like(tensors, gather(tensors))
    assert torch.equal(back, tensors[0])
    assert back.is_contiguous()


def test_views_share_the_buffer():
    tensors = [torch.zeros(3), torch.zeros(3)]
    buffer = gather(tensors)
    first, second = interpret_gathered_like(tensors, buffer)
    buffer.zero_()
    first.fill_(1)
    assert torch.equal(second, torch.zeros(3))
    assert buffer[:12].view(torch.float32).tolist() == [1, 1, 1]


@pytest.mark.parametrize("alone", [False, True])
def test_shapes_without_bytes_are_copied_as_torch_copies_them(alone):
    with FakeTensorMode():
        source, target = torch.ones(7, 1), torch.empty(7, 1)
        copy_into(target, source, alone=alone)
    assert target.shape == (7, 1)


def test_a_template_without_memory_gives_another_dtype():
    source = torch.randn(5, 3)
    template = like(source, torch.bfloat16)
    assert template.is_meta
    (view,) = interpret_gathered_like([template], torch.empty(gathered_bytes([template]), dtype=torch.uint8))
    copy_into(view, source)
    assert same(view, source.bfloat16())


def test_a_wrapper_is_built_again_around_views_of_the_buffer():
    wrapper = quantise(torch.randn(6, 32))
    buffer = gather([torch.ones(3), wrapper])
    _, back = interpret_gathered_like([torch.ones(3), wrapper], buffer)
    assert type(back) is type(wrapper)
    assert same(back.codes, wrapper.codes) and same(back.scale, wrapper.scale)
    start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
    assert all(start <= part.data_ptr() < end for part in inner_tensors(back))


def test_a_wrapper_counts_its_inner_tensors_and_keeps_its_form():
    wrapper = quantise(torch.randn(6, 32))
    assert tensor_bytes(wrapper) == 6 * 32 + 6 * 4
    assert gathered_bytes([wrapper]) == aligned(6 * 32) + aligned(6 * 4)
    assert like(wrapper, torch.bfloat16) is wrapper


def test_the_buffer_is_free_when_its_views_are():
    """Without waiting for the garbage collector: it may be a large part of a device's memory."""
    tensors = [torch.zeros(3), quantise(torch.randn(2, 4))]
    buffer = gather(tensors)
    storage = weakref.ref(buffer.untyped_storage())
    views = interpret_gathered_like(tensors, buffer)
    gc.disable()
    try:
        del buffer
        assert storage() is not None
        del views
        assert storage() is None
    finally:
        gc.enable()


@steady
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3)),
        max_size=6,
    )
)
def test_parts_are_aligned_and_do_not_overlap(layout):
    tensors = [torch.zeros(shape, dtype=dtype) for dtype, shape in layout]
    buffer = gather(tensors, spare=100)
    views = [view for view in interpret_gathered_like(tensors, buffer) if view.numel()]
    places = [(view.data_ptr() - buffer.data_ptr(), len(bits(view))) for view in views]
    assert all(place % ALIGNMENT == 0 for place, _ in places)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(places))
    assert sum(aligned(size) for _, size in places) == gathered_bytes(tensors)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (torch.empty(1023, dtype=torch.uint8), "need 1024 bytes, the buffer has 1023"),
        (torch.empty(2, 512, dtype=torch.uint8), "1-D uint8, not 2-D"),
        (torch.empty(1024, dtype=torch.int8), "1-D uint8, not 1-D torch.int8"),
    ],
)
def test_a_buffer_that_cannot_hold_the_tensors_is_refused(buffer, message):
    with pytest.raises(ValueError, match=message):
        interpret_gathered_like([torch.zeros(3), torch.zeros(3)], buffer)
