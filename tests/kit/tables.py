"""A small model with a table: what a text encoder is to Spillway."""

import torch
from safetensors.torch import save_file

from kit.sim_device import SimDevice
from spillway.ops.files.disk_map import DiskMap

ROWS, WIDTH = 1000, 64


DEVICES = {
    "cpu": lambda: None,
    "deferred": SimDevice,
    "overtaking": lambda: SimDevice(eager="some"),
    "synchronous": lambda: SimDevice(streams=0),
}


class Encoder(torch.nn.Module):
    """What a text encoder is to Spillway: a table, and layers."""

    def __init__(self, rows=ROWS, width=WIDTH, depth=3, embedding=torch.nn.Embedding, **options):
        super().__init__()
        self.embedding = embedding(rows, width, **options)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth))

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = torch.tanh(x + layer(x))
        return x


def written(path, build=Encoder, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    state = {key: tensor.detach().to(dtype) for key, tensor in build().state_dict().items()}
    save_file(state, path)
    return state


def reference(path, build=Encoder, dtype=torch.float32, patch=None):
    module = build().to(dtype).requires_grad_(False)
    state = {key: tensor.to(dtype) for key, tensor in DiskMap(path).state_dict().items()}
    if patch is not None:
        state["embedding.weight"] = patch(state["embedding.weight"].clone())
    module.load_state_dict(state, assign=True)
    return module


def tables(model):
    return [bundle for bundle in model.bundles if bundle.by_rows]


IDS = {
    "texts": torch.randint(0, ROWS, (3, 17), generator=torch.Generator().manual_seed(1)),
    "int32": torch.tensor([[5, 5, 0, 999]], dtype=torch.int32),
    "one": torch.tensor(7),
    "none": torch.empty(2, 0, dtype=torch.int64),
    "all of them": torch.arange(ROWS).flip(0),
    "not contiguous": torch.arange(60).view(6, 10).t()[::2],
}
