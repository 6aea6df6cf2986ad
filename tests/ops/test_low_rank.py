"""Truncated decompositions: exact where the rank suffices, near to the best where it does not, the same every time."""

import pytest
import torch

from spillway.ops.low_rank import low_rank


def matrix(rows, columns, rank, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    return product + noise * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("shape", [(300, 700), (700, 300), (20, 30), (3, 200), (1, 1)])
def test_a_matrix_of_that_rank(shape):
    wanted = matrix(*shape, rank=8)
    up, down = low_rank(wanted, 8)
    assert up.shape == (shape[0], min(8, *shape)) and down.shape == (min(8, *shape), shape[1])
    assert (up @ down - wanted).norm() < 1e-5 * wanted.norm()
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(400, 900), (900, 400)])
def test_a_matrix_of_full_rank(shape):
    wanted = matrix(*shape, rank=20, noise=0.5)
    up, down = low_rank(wanted, 16)
    values = torch.linalg.svdvals(wanted)
    best = values[16:].square().sum().sqrt()
    assert best <= (up @ down - wanted).norm() * 1.0001 < best * 1.001


def test_the_same_every_time():
    wanted = matrix(400, 300, rank=20, noise=0.5)
    torch.manual_seed(1)
    first = low_rank(wanted, 4)
    torch.manual_seed(2)
    assert all(torch.equal(one, other) for one, other in zip(first, low_rank(wanted, 4), strict=True))


def test_zeros():
    up, down = low_rank(torch.zeros(300, 200), 4)
    assert torch.equal(up @ down, torch.zeros(300, 200))
