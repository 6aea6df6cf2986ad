"""A model is used while its file comes: every reader waits for what it reads, and the bits are those of the file."""

import copy
import io
import os
import threading

import pytest
import torch
from safetensors.torch import save_file

from kit.coming import slowly
from kit.gguf_files import write_gguf
from kit.nets import Blocks, Stack, dynamic, random_state, same, write
from kit.sim_device import SimDevice
from spillway.ops.files.check_before_read import CheckBeforeRead
from spillway.ops.files.coming_file import patience
from spillway.ops.files.deferred import Deferred, Stored
from spillway.ops.files.disk_map import DiskMap, check_files
from spillway.ops.files.read_whole import read_whole
from spillway.ops.files.save_pipeline import save
from spillway.ops.gguf.header import WINDOW_BYTES
from spillway.ops.gguf.vision import as_one
from spillway.ops.lending.table import LARGE_BYTES
from spillway.ops.parts.open_map import open_map
from spillway.ops.parts.probe import probe
from spillway.ops.remote.download import THREADS
from spillway.patcher.preload import load_now

# There a file gets its name only once no model lies in it, which the end of each of these tests waits for.
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows renames no file that is mapped")


@pytest.fixture
def original(tmp_path):
    (tmp_path / "there").mkdir()
    path = tmp_path / "there" / "model.safetensors"
    write(path, Stack())
    return path


def ran(path, device=None, **options):
    model = dynamic(Stack, path, device=SimDevice() if device == "sim" else None, **options)
    x = model.module.input()
    return model(x), model(x)


# Each reads a file in another way.
READERS = {
    "a model in place": ran,
    "a model that is cast": lambda path: ran(path, dtype=torch.bfloat16),
    "a model of which nothing stays": lambda path: ran(path, vram_bytes=0),
    "a model on a device": lambda path: ran(path, "sim"),
    "a model on a device, of which nothing stays": lambda path: ran(path, "sim", vram_bytes=0, pinned_bytes=0),
    "a model on a device, pinned": lambda path: ran(path, "sim", vram_bytes=0),
    "a preloaded model": lambda path: _preloaded(path),
    "a weight outside of a layer": lambda path: _of_a_weight(path, lambda weight: weight.sum()),
    "a view of one": lambda path: _of_a_weight(path, lambda weight: weight[3:5].t() + 1),
    "a weight as an array": lambda path: _of_a_weight(path, lambda weight: torch.from_numpy(weight.numpy().copy())),
    "a state dict": lambda path: [tensor + 0 for tensor in dynamic(Stack, path).module.state_dict().values()],
    "a state dict that is written": lambda path: _written_by_torch(dynamic(Stack, path).module.state_dict()),
    "a deep copy": lambda path: list(copy.deepcopy(dynamic(Stack, path).module).state_dict().values()),
    "a write into a weight": lambda path: _written(dynamic(Stack, path)),
    "a saved model": lambda path: _saved(path),
    "a closed model": lambda path: _closed(path),
    "a mapping": lambda path: [DiskMap(path)[key] + 0 for key in sorted(DiskMap(path))],
    "a mapping in another dtype": lambda path: list(DiskMap(path, dtype=torch.bfloat16).state_dict().values()),
    "tensors that are checked": lambda path: _checked(path),
    "code of others": lambda path: _by_others(path),
    "code of others in inference mode": torch.inference_mode()(lambda path: _by_others(path)),
    "a file in memory": lambda path: [tensor for _, tensor in sorted(read_whole(path)[0].items())],
    "a header": lambda path: torch.tensor(list(repr(probe(path).dtypes).encode())),
}


def _of_a_weight(path, read):
    model = dynamic(Stack, path)
    return read(model.module.layers[5].weight)


def _preloaded(path):
    model = dynamic(Stack, path, device=SimDevice())
    load_now(model)
    return model(model.module.input())


def _written_by_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return [tensor.detach() for tensor in torch.load(file).values()]


def _written(model):
    with torch.no_grad():
        model.module.layers[3].weight[0].fill_(0.5)
    return model(model.module.input())


def _saved(path):
    model = dynamic(Stack, path)
    weights = {param.key: param.source for bundle in model.bundles for param in bundle.params}
    target = path.with_suffix(".saved")
    save(target, {key: Deferred.of(Stored(one), tuple(one.shape), one.dtype) for key, one in weights.items()})
    return [tensor for _, tensor in sorted(read_whole(target)[0].items())]


def _closed(path):
    """A weight that somebody kept gives what is stored."""
    model = dynamic(Stack, path, dtype=torch.bfloat16)
    kept = model.module.layers[4].weight
    model.close()
    return kept + 0


def _checked(path):
    tensor = DiskMap(path).tensor("layers.7.weight").t()  # a view, which outlives its map
    check_files([tensor])
    return tensor.contiguous()


def _by_others(path):
    disk_map = DiskMap(path)
    tensors = disk_map.state_dict()
    with CheckBeforeRead(disk_map.files):
        joined = torch.cat([tensors["layers.0.weight"].detach(), torch.nn.Parameter(tensors["layers.1.weight"]).data])
        listed = torch.tensor(tensors["layers.2.bias"].view(-1).tolist())
        array = torch.from_numpy(tensors["layers.3.bias"].numpy() + 1)
        cast, moved = tensors["layers.4.bias"].to(torch.bfloat16), tensors["layers.5.weight"].t().reshape(-1)
        laid = tensors["layers.6.weight"].t().contiguous()
        return joined, listed, array, cast, moved, laid, torch.tensor(tensors["layers.9.bias"][0].item())


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [one for part in value for one in flat(part)]


@pytest.mark.parametrize("how", READERS)
def test_every_reader_waits_for_what_it_reads(how, original, tmp_path):
    wanted = flat(READERS[how](original))
    with slowly(original, tmp_path) as (_, path):
        found = flat(READERS[how](path))
    assert len(found) == len(wanted) and all(map(same, found, wanted))
    assert path.read_bytes() == original.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} <= {"there", "model.safetensors", "model.saved"}


def _norm(path):
    return open_map(path).tensor("model.layers.0.input_layernorm.weight")


def _tower(path):
    return as_one(DiskMap(path).state_dict())["visual.blocks.0.attn.qkv.weight"]


@pytest.mark.parametrize("read", [_norm, _tower])
def test_what_a_map_makes_of_its_tensors_waits_for_them(read, tmp_path):
    """Norms of llama.cpp's files in the dtype of the model, and weights that a vision tower has in pieces."""
    (tmp_path / "there").mkdir()
    fill = torch.randn(64, 256 if read is _tower else WINDOW_BYTES // 64)
    if read is _norm:
        heads = {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 2}
        tensors = {"blk.0.ffn_up.weight": fill, "blk.0.attn_norm.weight": torch.randn(32)}
        original = tmp_path / "there" / "llama.gguf"
        write_gguf(original, tensors, {"general.architecture": "llama", **heads})
    else:
        original = tmp_path / "there" / "tower.safetensors"
        save_file({f"visual.blocks.0.attn.{part}.weight": fill + n for n, part in enumerate("qkv")}, original)
    wanted = read(original)
    with slowly(original, tmp_path) as (_, path):
        found = read(path)
    assert same(found, wanted)


def test_code_that_only_looks_at_a_file_waits_for_nothing(original, tmp_path):
    with slowly(original, tmp_path) as (server, path):
        disk_map = DiskMap(path)
        tensors = disk_map.state_dict()
        with CheckBeforeRead(disk_map.files):
            shapes = [tuple(torch.nn.Parameter(one.detach()).t().shape) for one in tensors.values()]
            assert len([torch.empty_like(one) for one in tensors.values()]) == len(shapes)
        model = dynamic(Stack, disk_map)
        assert [tuple(one.shape) for one in model.module.state_dict().values()]
        assert not server.gate.is_set(), "somebody waited for more than the header"


def test_a_layer_runs_as_soon_as_it_has_come(original, tmp_path):
    """The first step runs behind the download."""
    sent = []
    with slowly(original, tmp_path, rate=1e6) as (server, path):
        model = dynamic(Stack, path)
        model.module.layers[0].register_forward_hook(lambda *_: sent.append(server.sent))
        found = model(model.module.input())
    assert same(found, ran(original)[0])
    assert sent[0] < 0.6 * original.stat().st_size


class WithMore(torch.nn.Module):
    """A model beside which its file has weights that it does not use, as a checkpoint has a VAE."""

    def __init__(self):
        super().__init__()
        self.model = Stack(6)

    def forward(self, x):
        return self.model(x)


def test_the_result_comes_before_the_last_byte(tmp_path):
    (tmp_path / "there").mkdir()
    original = tmp_path / "there" / "model.safetensors"
    state = random_state(WithMore(), torch.float32)
    save_file({**state, "a.vae": torch.randn(1 << 18), "z.vae": torch.randn(1 << 18)}, original)
    model = dynamic(WithMore, original)
    wanted = model(model.module.model.input())
    with slowly(original, tmp_path, rate=2e6) as (server, path):
        model = dynamic(WithMore, path)
        found = model(model.module.model.input())
        sent = server.sent
    assert same(found, wanted)
    assert sent < 0.8 * original.stat().st_size


class Embedded(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.table = torch.nn.Embedding(rows, 256)
        self.last = torch.nn.Linear(256, 8)

    def forward(self, ids):
        return self.last(self.table(ids))


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_a_table_brings_the_rows_that_are_looked_up(device, tmp_path):
    (tmp_path / "there").mkdir()
    original, rows = tmp_path / "there" / "model.safetensors", LARGE_BYTES // 1024
    write(original, Embedded(rows))
    ids = torch.tensor([[5, rows - 1, 5, rows // 2]])
    wanted = dynamic(lambda: Embedded(rows), original)(ids)
    with slowly(original, tmp_path, rate=4e6) as (server, path):
        model = dynamic(lambda: Embedded(rows), path, device=SimDevice() if device == "sim" else None)
        found = model(ids)
        sent = server.sent
    assert same(found.cpu(), wanted)
    assert sent < 0.5 * original.stat().st_size


def test_a_model_that_is_whole_is_an_ordinary_one(original, tmp_path):
    with slowly(original, tmp_path) as (_, path):
        model = dynamic(Stack, path)
        x = model.module.input()
        wanted = model(x)
    assert same(model(x), wanted)
    ordinary = dynamic(Stack, original)
    ordinary(x)
    for one, other in zip(model.module.layers, ordinary.module.layers, strict=True):
        assert type(one.weight) is type(other.weight)
    assert not model.is_coming and same(model(x), wanted)


def test_layers_that_run_in_another_order_than_they_lie_in_the_file_come_in_that_order(tmp_path):
    (tmp_path / "there").mkdir()
    original = tmp_path / "there" / "model.safetensors"
    write(original, Blocks(width=128))  # conv lies behind blocks and before embed, and runs last
    with slowly(original, tmp_path, rate=2e6) as (server, path):
        disk_map = DiskMap(path)
        model = dynamic(lambda: Blocks(width=128), disk_map)
        places = [disk_map.spec(f"blocks.{number}.1.weight").offset for number in range(6)]
        last = disk_map.spec("conv.weight").offset
        model(model.module.input())
    came = [next(n for n, (first, stop) in enumerate(server.asked) if first <= at <= stop) for at in (*places, last)]
    # Threads that take blocks one after the other may ask in another order.
    assert all(abs(one - other) < THREADS for one, other in zip(came, sorted(came), strict=True)), server.asked
    assert came[-1] > came[0] + THREADS


class Stop(Exception):
    pass


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_whoever_asks_for_a_stop_ends_the_wait_and_not_the_download(device, original, tmp_path, monkeypatch):
    wanted = ran(original)[0]
    with slowly(original, tmp_path, rate=1e6) as (_, path):
        model = dynamic(Stack, path, device=SimDevice() if device == "sim" else None)
        asked = threading.Timer(0.2, lambda: monkeypatch.setattr(patience, "interrupt", Stop))
        asked.start()
        with pytest.raises(Stop):
            model(model.module.input())
        monkeypatch.undo()
        assert same(model(model.module.input()).cpu(), wanted)
