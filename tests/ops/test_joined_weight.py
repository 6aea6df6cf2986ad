"""A weight in pieces: it is read as one, gathered into one memory, and written into piece by piece."""

import copy

import pytest
import torch

from kit.nets import same
from spillway.ops.gather import copy_into, gathered_bytes, interpret_gathered_like, memory_of, tensor_bytes
from spillway.ops.joined_weight import JoinedWeight


def pieces(dtype=torch.float32, columns=(4,)):
    torch.manual_seed(2)
    return [torch.randn(rows, *columns).to(dtype) for rows in (3, 1, 5)]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("columns", [(), (4,), (2, 3)], ids=str)
def test_operations_get_the_whole(columns, inference):
    parts = pieces(columns=columns)
    with torch.inference_mode(inference):
        weight, whole = JoinedWeight(parts), torch.cat(parts)
        assert weight.shape == whole.shape and weight.dtype == whole.dtype
        for operation in (
            lambda one: one + 1,
            lambda one: one.to(torch.float64),
            lambda one: one.clone(),
            lambda one: one.flatten(),
            lambda one: one.transpose(0, -1),
            lambda one: one[2:7].clone(),
            lambda one: one[-3:].clone(),
            lambda one: one[7:3].clone(),
            lambda one: one[::2],
            lambda one: one[4],
            lambda one: one[-1],
            lambda one: torch.cat([one, one]),
            lambda one: torch.nn.functional.linear(torch.ones(2, one.shape[-1]), one) if one.dim() == 2 else one.sum(),
        ):
            assert same(operation(weight).contiguous(), operation(whole).contiguous())
        assert weight.to(torch.float32) is weight and isinstance(weight.detach(), JoinedWeight)
        assert isinstance(weight[1:4], JoinedWeight)
        assert [part.data_ptr() for part in memory_of(weight)] == [part.data_ptr() for part in parts]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_is_gathered_without_a_copy_of_the_whole(dtype, alone, monkeypatch):
    parts, bias = pieces(torch.bfloat16), torch.randn(9).to(torch.bfloat16)
    weight = JoinedWeight(parts)
    monkeypatch.setattr(JoinedWeight, "whole", None)
    assert tensor_bytes(weight) == 9 * 4 * 2 and gathered_bytes([weight, bias]) == 1024
    templates = [torch.empty(9, 4, dtype=dtype, device="meta"), bias]
    views = interpret_gathered_like(templates, torch.zeros(1024, dtype=torch.uint8))
    for view, source in zip(views, (weight, bias), strict=True):
        copy_into(view, source, alone=alone)
    assert same(views[0], torch.cat(parts).to(dtype)) and same(views[1], bias)


def test_writes_go_into_the_pieces_and_are_counted():
    parts = pieces()
    weight, whole = JoinedWeight(parts), torch.cat(parts)
    writes = (
        lambda one: one.mul_(2),
        lambda one: one[2:6].add_(1),
        lambda one: one[3].zero_(),
        lambda one: one.copy_(torch.ones(9, 4)),
        lambda one: one.data.sub_(3),
        lambda one: torch.add(one, 1, out=one),
    )
    for write in writes:
        before = [part._version for part in parts]
        write(weight)
        write(whole)
        assert same(torch.cat(parts), whole)
        assert any(part._version > count for part, count in zip(parts, before, strict=True))


def test_a_copy_is_an_ordinary_weight():
    weight = torch.nn.Parameter(JoinedWeight(pieces()), requires_grad=False)
    copied = copy.deepcopy(weight)
    assert type(copied) is torch.nn.Parameter and same(copied.detach(), torch.cat(pieces()))
    module = torch.nn.Linear(4, 9, bias=False)
    module.load_state_dict({"weight": weight}, assign=True)
    assert isinstance(module.weight, JoinedWeight) and isinstance(module.weight, torch.nn.Parameter)
    assert same(module(torch.ones(2, 4)).detach(), torch.nn.functional.linear(torch.ones(2, 4), torch.cat(pieces())))
