"""A net of equal blocks, and a dynamic model of it that is compiled by blocks."""

from __future__ import annotations

import torch

from kit import nets
from spillway.ops.compile.block_compiler import BlockCompiler
from spillway.ops.compile.compiled_function import CompileSettings
from spillway.ops.files.disk_map import DiskMap
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy

WIDTH, DEPTH = 64, 5


class Block(torch.nn.Module):
    """Nested modules, a parameter and a buffer of its own, options; it writes into its input, as blocks do."""

    def __init__(self, width=WIDTH, factor=1.0):
        super().__init__()
        self.factor = factor
        self.norm = torch.nn.LayerNorm(width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width, bias=False)
        )
        self.gate = torch.nn.Parameter(torch.empty(width))
        self.register_buffer("shift", torch.empty(width))

    def forward(self, x, options=None):
        x += self.factor * self.gate * self.mlp(self.norm(x) + self.shift)
        return x


class Net(torch.nn.Module):
    def __init__(self, block=Block, depth=DEPTH):
        super().__init__()
        self.embed = torch.nn.Linear(WIDTH, WIDTH)
        self.blocks = torch.nn.ModuleList(block() for _ in range(depth))
        self.head = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x, **options):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, **options)
        return self.head(x)


NAMES = [f"blocks.{index}" for index in range(DEPTH)]


def inputs(batch=2, length=7, seed=0):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def compiled(path, build=Net, dtype=torch.float32, device=None, backend="eager", prepare=None, **policy):
    """Write a file, and return a model of it that is compiled by blocks and the plain module beside it."""
    state = nets.write(path, build(), dtype)
    with nets.skip_model_initialization():
        module = build()
    model = DynamicModel(module, DiskMap(path), "cpu", Policy(**policy), backend=device, blocks=NAMES)
    settings = backend if isinstance(backend, CompileSettings) else CompileSettings(backend=backend)
    compiler = BlockCompiler(settings, model.ledger, prepare=prepare)
    compiler.attach(model.blocks)
    return model, nets.plain(build, state, torch.float32)


def said(model, text):
    return [line for line in model.ledger.decisions if text in line]


def nothing_lent(model):
    return all(bundle.loan is None and bundle.depth == 0 for bundle in model.bundles)
