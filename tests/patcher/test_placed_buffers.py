"""Buffers are on the device while a model is prepared, count in its budget, and come back with what was written."""

import torch

from spillway.patcher.buffers import PlacedBuffers

META = torch.device("meta")  # another device than the CPU, on every machine


class Counting(torch.nn.Module):
    """Reads buffers before its first layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(4096.0))
        self.register_buffer("runs", torch.zeros(1))
        self.register_buffer("alias", self.table)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        self.runs.add_(1)
        return self.linear(x + self.table[:8])

    def input(self):
        return torch.ones(2, 8)


def test_buffers_go_and_come_back():
    module = Counting()
    before = {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False)}
    placed = PlacedBuffers(module, META)
    placed.place()
    assert all(buffer.device == META for buffer in module.buffers()) and module.alias is module.table
    assert placed.nbytes == 4096 * 4 + 4
    placed.place()
    assert placed.nbytes == 4096 * 4 + 4
    placed.give_back()
    assert placed.nbytes == 0
    assert all(buffer is before[name] for name, buffer in module.named_buffers(remove_duplicate=False))


def test_what_is_written_comes_back_and_what_is_replaced_stays(monkeypatch):
    """Between two kinds of host memory: `to` makes a copy, as between devices."""
    module = Counting()
    placed = PlacedBuffers(module, META)
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: real(tensor, "cpu", copy=True))
    table = module.table
    placed.place()
    monkeypatch.undo()
    module.runs.add_(3)
    module.alias = torch.ones(5)
    placed.give_back()
    assert module.runs.item() == 3 and module.table is table and module.alias.shape == (5,)
