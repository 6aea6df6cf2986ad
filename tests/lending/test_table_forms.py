"""Tables that are patched, quantised or needed whole: rows with the bits of the whole, or a bundle as any other."""

import pytest
import torch
import torch.nn.functional as F

from kit.gguf_files import random_blocks, write_gguf
from kit.nets import Scaled, dynamic, quantise, same
from kit.sim_device import SimDevice
from kit.tables import DEVICES, IDS, ROWS, WIDTH, Encoder, reference, tables, written
from spillway.ops import rows
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.files.source import StateDict
from spillway.ops.gguf.gguf_map import GgufMap
from spillway.ops.lending import table
from spillway.ops.lending.lookup import register_lookup
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy, Rule


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(table, "LARGE_BYTES", ROWS * WIDTH)


@pytest.fixture
def path(tmp_path):
    written(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


class Elementwise:
    """A patch that needs no other row, and knows it."""

    def __init__(self, delta):
        self.delta, self.asked = delta, []

    def __call__(self, weight):
        return weight.mul_(1.5).add_(self.delta.to(weight.dtype))

    def of_rows(self, which):
        self.asked.append(which)
        return Elementwise(self.delta[which])


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_patches_of_single_rows_are_computed_for_the_rows(tmp_path, device, stored, budget):
    path, ids = tmp_path / "m.safetensors", IDS["texts"]
    written(path, dtype=stored)
    patch = Elementwise(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)))
    plain, patched = reference(path), reference(path, patch=patch)
    model = dynamic(Encoder, path, device=device(), vram_bytes=budget)
    for wanted, patches in ((plain, {}), (patched, {"embedding.weight": patch}), (plain, {})):
        model.set_patches(patches)
        assert tables(model)
        for _ in range(2):
            assert same(model(ids), wanted(ids))
    assert patch.asked[-1].tolist() == ids.unique().tolist()


@pytest.mark.parametrize("budget", [None, 0, 250_000])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_any_other_patch_makes_it_a_bundle_as_any_other(path, device, budget):
    """And back: the plan follows each time, and nothing brings the whole ahead once it is a table again."""

    def turned(weight):
        return weight.flip(0)

    ids = IDS["texts"]
    plain, patched = reference(path), reference(path, patch=turned)
    model = dynamic(Encoder, path, device=device(), vram_bytes=budget)
    for _ in range(2):
        for wanted, patches in ((plain, {}), (patched, {"embedding.weight": turned})):
            model.set_patches(patches)
            for _ in range(3):
                assert same(model(ids), wanted(ids))
            (embedding,) = [bundle for bundle in model.bundles if bundle.name == "embedding"]
            assert embedding.by_rows != bool(patches)
            assert (embedding in model.execution_order()) == (embedding in model.residency.bundles) == bool(patches)
            if budget is None:
                assert model.residency.is_resident(embedding) == bool(patches)
    model.set_patches({})
    model(ids)
    before = model.ledger.counters.bytes_streamed
    model(ids)
    assert model.ledger.counters.bytes_streamed - before < model.total_bytes + 52 * WIDTH * 4


class Quantised(Scaled):
    """Looked up by one operation with two tables, as ComfyUI's INT8 embeddings are."""

    @staticmethod
    def __tensor_unflatten__(parts, dtype, outer_size, outer_stride):
        return Quantised(parts["codes"], parts["scale"], dtype)


@torch.library.custom_op("spillway_tests::rows", mutates_args=())
def look_up(codes: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.embedding(ids, codes).float() * scale[ids][..., None]


class Dequantising(torch.nn.Embedding):
    def forward(self, ids):
        return look_up(self.weight.codes, self.weight.scale if self.own is None else self.own, ids)


@pytest.mark.parametrize("own", [False, True])
def test_parts_of_a_quantised_table_are_looked_up_together(monkeypatch, own):
    """Where the forward has scales of its own, which are whole, so is the rest."""
    monkeypatch.setattr(rows, "_by_rows", [lambda tensor: isinstance(tensor, Quantised)])
    register_lookup(torch.ops.spillway_tests.rows.default, (0, 1), 2)
    monkeypatch.setattr(table, "LARGE_BYTES", ROWS * WIDTH)
    plain = quantise(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)))
    with torch.device("meta"):
        module = Dequantising(ROWS, WIDTH)
    module.own = plain.scale if own else None
    source = StateDict({"weight": Quantised(plain.codes, plain.scale)})
    model = DynamicModel(module, source, "cpu", backend=SimDevice())
    assert tables(model)
    for ids in (IDS["texts"], torch.tensor([ROWS - 1])):
        assert same(model(ids), look_up(plain.codes, plain.scale, ids))
    assert bool(tables(model)) != own
    if not own:
        assert model.ledger.counters.bytes_streamed == (IDS["texts"].unique().numel() + 1) * (WIDTH + 4)


class TwoTables(Encoder):
    """Tables that follow one another, as Gemma 3n's do."""

    def __init__(self):
        super().__init__()
        self.second = torch.nn.Embedding(ROWS, WIDTH)

    def forward(self, ids):
        return super().forward(ids) + self.second(self.embedding(ids)[..., 0].abs().mul(9).long())


@pytest.mark.parametrize("budget", [None, 0])
def test_tables_that_were_patched_are_not_brought_ahead_afterwards(path, budget):
    written(path, TwoTables)
    plain, ids = reference(path, TwoTables), IDS["texts"]
    model = dynamic(TwoTables, path, device=SimDevice(), vram_bytes=budget)
    assert len(tables(model)) == 2
    for patches in ({}, dict.fromkeys(("embedding.weight", "second.weight"), lambda weight: weight.clone()), {}):
        model.set_patches(patches)
        for _ in range(3):
            before = model.ledger.counters.bytes_streamed
            assert same(model(ids), plain(ids))
    assert len(tables(model)) == 2 and len(model.execution_order()) == 3
    moved = model.ledger.counters.bytes_streamed - before
    assert moved <= (model.total_bytes if budget == 0 else 0) + 3 * 51 * WIDTH * 4
    assert not any(bundle.successor is not None and bundle.successor.by_rows for bundle in model.bundles)


class Tied(Encoder):
    """Multiplies with its table again, as language models do."""

    def forward(self, ids):
        return F.linear(super().forward(ids), self.embedding.weight)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_table_that_is_read_as_a_whole_takes_a_place(path, device, budget):
    plain = reference(path, Tied, torch.bfloat16)
    model = dynamic(Tied, path, torch.bfloat16, device=device(), vram_bytes=budget)
    for _ in range(3):
        assert same(model(IDS["texts"]), plain(IDS["texts"]))
    assert not tables(model)
    assert sum("read as a whole" in line for line in model.ledger.decisions) == 1
    if budget is None:
        counters = vars(model.ledger.counters).copy()
        assert same(model(IDS["texts"]), plain(IDS["texts"]))
        assert vars(model.ledger.counters)["bytes_streamed"] == counters["bytes_streamed"]
        assert all(resident for _, _, resident in model.bundle_report()) and len(model.bundle_report()) == 4


@pytest.mark.parametrize("storage", [None, torch.bfloat16])
def test_a_rule_says_in_which_dtype_rows_are_used(path, storage):
    rules = (Rule("embedding", storage_dtype=storage, compute_dtype=torch.float64),)
    model = dynamic(Encoder, path, policy=Policy(rules=rules), device=SimDevice())
    wanted = DiskMap(path).tensor("embedding.weight").to(storage or torch.float32).double()
    assert same(model.module.embedding(IDS["texts"]), F.embedding(IDS["texts"], wanted)) and tables(model)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_blocks_of_a_gguf_file_are_brought_by_row(tmp_path, device, kind):
    """With a LoRA too, which stays beside them."""
    rows, width = 600, 256
    blocks = random_blocks(kind, rows * width)
    path = write_gguf(tmp_path / "m.gguf", {"weight": (kind, (rows, width), blocks)})
    with torch.device("meta"):
        module = torch.nn.Embedding(rows, width, dtype=torch.bfloat16)
    source = GgufMap(path)
    model = DynamicModel(module, source, "cpu", backend=device())
    whole = source.tensor("weight")
    ids = torch.tensor([[3, 599, 3, 0], [77, 1, 1, 2]])
    assert tables(model) and same(model(ids), F.embedding(ids, whole.dequantize()))
    if not model.backend.in_place:
        assert model.ledger.counters.bytes_streamed == ids.unique().numel() * blocks.nbytes // rows

    class Branch:
        rank = 4

        def low_rank(self, device):
            generator = torch.Generator().manual_seed(2)
            factors = torch.randn(4, width, generator=generator), torch.randn(rows, 4, generator=generator)
            return tuple(factor.to(device) for factor in factors)

    model.set_patches({"weight": Branch()})
    down, up = (factor.to(whole.dtype) for factor in Branch().low_rank("cpu"))
    patched = whole.dequantize().float().addmm_(up.float(), down.float()).to(whole.dtype)
    for asked in (ids, torch.tensor([5]), torch.empty(0, dtype=torch.int64)):
        assert same(model(asked), F.embedding(asked, patched))
    assert tables(model)
