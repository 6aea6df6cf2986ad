"""The best product of two thin matrices for a matrix: its truncated singular value decomposition."""

from __future__ import annotations

import torch

# Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1.
OVERSAMPLING = 16
POWER_ITERATIONS = 4
SEED = 0x5F111


def low_rank(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up [rows, k], down [k, columns]), k = min(rank, rows, columns), whose product is nearest to the matrix.

    Both have the same share of its size. float32 in and out, with the same bits for the same matrix. Where the rank is
    small, random projection finds the decomposition. It is exact for matrices of that rank, and near to the best for
    others.
    """
    rows, columns = matrix.shape
    rank = min(rank, rows, columns)
    width = rank + OVERSAMPLING
    if 4 * width >= min(rows, columns):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _range_of(matrix, width)
        u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


def _range_of(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """Return an orthonormal basis [rows, width] of the directions in which the matrix is largest."""
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(POWER_ITERATIONS):
        basis, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ basis)
    return basis
