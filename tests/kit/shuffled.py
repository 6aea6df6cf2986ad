"""A stack of layers that run in another order than they are registered in."""

import random

import torch

DEPTH, WIDTH = 24, 64


class Shuffled(torch.nn.Module):
    """seed: of the order."""

    def __init__(self, seed):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.order = list(range(DEPTH))
        random.Random(seed).shuffle(self.order)

    def input(self):
        return torch.linspace(-1, 1, WIDTH).repeat(3, 1)

    def forward(self, x):
        for index in self.order:
            x = torch.tanh(self.layers[index](x))
        return x
