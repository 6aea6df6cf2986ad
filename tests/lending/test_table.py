"""A large embedding stays in its file. A lookup brings the rows that it asks for, and gives the plain module's bits."""

import gc

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kit.nets import dynamic, same
from kit.sim_device import SimDevice
from kit.tables import DEVICES, IDS, ROWS, WIDTH, Encoder, reference, tables, written
from spillway.ops.files.disk_map import DiskMap
from spillway.ops.files.source import StateDict
from spillway.ops.files.watched_file import FileChanged
from spillway.ops.gather import aligned
from spillway.ops.lending import lend_rows, table
from spillway.ops.lending.idle_weight import IdleWeight
from spillway.patcher.dynamic_model import DynamicModel
from spillway.patcher.policy import Policy, Rule
from spillway.patcher.preload import load_now
from spillway.patcher.residency import STAGED


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    monkeypatch.setattr(table, "LARGE_BYTES", ROWS * WIDTH)


@pytest.fixture
def path(tmp_path):
    written(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_any_ids_give_the_bits_of_the_plain_module(tmp_path, device, stored, budget):
    build, path = lambda: Encoder(padding_idx=900), tmp_path / "m.safetensors"
    state = written(path, dtype=stored)
    plain = reference(path, build)
    model = dynamic(build, path, device=device(), vram_bytes=budget)
    assert [bundle.name for bundle in tables(model)] == ["embedding"]
    for ids in IDS.values():
        for _ in range(2):
            before = model.ledger.counters.bytes_streamed
            assert same(model.module.embedding(ids), plain.embedding(ids))
            moved = model.ledger.counters.bytes_streamed - before
            in_place = model.backend.in_place and stored == torch.float32
            assert moved == (0 if in_place else ids.unique().numel() * WIDTH * stored.itemsize)
            assert same(model(ids), plain(ids))
    assert same(state["embedding.weight"], DiskMap(path).tensor("embedding.weight"))
    assert tables(model) and model.ledger.counters.reads == 0


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(
    "ids", [[ROWS], [3, -1], [-ROWS - 5, 5], [1 << 40]], ids=["past", "negative", "far below", "far above"]
)
def test_ids_without_a_row_raise_what_torch_raises(path, device, ids):
    model = dynamic(Encoder, path, torch.bfloat16, device=device())
    plain = reference(path, dtype=torch.bfloat16)
    for module in (plain, model):
        with pytest.raises(IndexError, match="index out of range in self"):
            module(torch.tensor(ids))
    with pytest.raises(RuntimeError, match="indices"):
        model(torch.tensor([1.0]))
    assert same(model(IDS["texts"]), plain(IDS["texts"]))


def test_a_table_has_no_part_in_the_plan(path):
    """It neither stays nor counts as offloaded. What is left of the budget is for the layers."""
    device = SimDevice()
    model = dynamic(Encoder, path, device=device, vram_bytes=3 * (WIDTH + 2) * WIDTH * 4)
    (embedding,) = tables(model)
    assert model.total_bytes == sum(bundle.nbytes for bundle in model.bundles) - embedding.nbytes
    for _ in range(3):
        model(IDS["texts"])
    assert model.plan.offloaded == 0 and model.plan.resident == 3 and model.plan.reserve == 0
    assert all(resident for _, _, resident in model.bundle_report()) and len(model.bundle_report()) == 3
    assert embedding not in model.execution_order() and embedding.vbar_slice is None and embedding.loan is None
    assert device.peak <= model.peak_bytes == model.total_bytes + aligned(IDS["texts"].unique().numel() * WIDTH * 4)
    assert device.held() == model.device_bytes == model.total_bytes >= model.pinned_bytes
    assert sum("each lookup brings the rows" in line for line in model.ledger.decisions) == 1
    assert load_now(model) == model.total_bytes and tables(model)
    model.close()
    assert device.held() == 0


def test_a_giant_table_beside_small_layers_costs_them_nothing(tmp_path):
    """A table of 40 MB in a budget of 30 MB, beside 121 layers of 0.3 MB: UMT5-XXL and 1.5 GB, scaled down."""
    rows, width, depth = 40960, 256, 121

    def build():
        return Encoder(rows, width, depth)

    path = tmp_path / "m.safetensors"
    written(path, build)
    plain = reference(path, build)
    layer = (width + 2) * width * 4
    ids = torch.randint(0, rows, (1, 512))
    for budget, stay in ((30 << 20, 108), (48 << 20, 121)):
        device = SimDevice()
        model = dynamic(build, path, device=device, vram_bytes=budget)
        for _ in range(3):
            assert same(model(ids), plain(ids))
        assert sum(resident for _, _, resident in model.bundle_report()) >= stay
        assert model.plan.reserve <= 4 * layer and device.peak <= budget
        assert model.staging_bytes <= STAGED * layer


def test_the_peak_of_a_large_table_is_its_rows(tmp_path):
    """300 MB of fp8, computed in fp32, in a budget of 20 MB: 512 rows and their casts."""
    rows, width = 75_000, 4096
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    pattern = torch.randn(1000, width).to(torch.float8_e4m3fn)
    save_file({"weight": pattern.view(torch.uint8).repeat(rows // 1000, 1).view(torch.float8_e4m3fn)}, path)
    ids = torch.randint(0, rows, (1, 512))
    device = SimDevice()
    with torch.device("meta"):
        module = torch.nn.Embedding(rows, width)
    model = DynamicModel(module, DiskMap(path), "cpu", Policy(vram_bytes=20 << 20), backend=device)
    assert same(model(ids), pattern.float()[ids % 1000])
    assert device.peak <= 512 * width + 4096 and model.peak_bytes <= 20 << 20
    assert device.held() == 0


class Positions(torch.nn.Embedding):
    """Looks up other rows than its ids, which it compares with numbers: fairseq's and OPT's are such."""

    def forward(self, ids):
        positions = torch.cumsum((ids != 5).long(), -1) + 2
        return (
            super().forward(positions)
            + self.weight[ids]
            + self.weight.index_select(0, ids.flatten()).view(1, -1, WIDTH)
        )


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_an_embedding_may_look_up_whatever_it_wants(path, device):
    def build():
        return Encoder(embedding=Positions)

    model, plain = dynamic(build, path, torch.float16, device=device()), reference(path, build, torch.float16)
    seen = []
    model.module.embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.module.embedding.register_forward_hook(lambda module, args, out: out * 2)
    plain.embedding.register_forward_hook(lambda module, args, out: out * 2)
    ids = torch.tensor([[5, 900, 3, 5, -1, 44]]).abs()
    assert same(model(ids), plain(ids)) and same(seen[0], ids)
    weight = model.module.embedding.weight
    assert isinstance(weight, IdleWeight)
    before = model.ledger.counters.bytes_streamed
    read = weight[torch.tensor([[-1, 4]])]
    assert same(read, plain.embedding.weight[torch.tensor([[-1, 4]])]) and type(read) is torch.Tensor
    assert model.ledger.counters.bytes_streamed - before == 2 * WIDTH * 4
    with pytest.raises(IndexError):
        weight[torch.tensor([ROWS])]
    assert tables(model)


class Nested(torch.nn.Embedding):
    """Calls itself with other ids."""

    def forward(self, ids, deeper=True):
        x = super().forward(ids)
        return x + self(ids.flip(-1), deeper=False) if deeper else x


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_nested_call_has_rows_of_its_own(path, device):
    def build():
        return Encoder(embedding=Nested)

    model, plain = dynamic(build, path, torch.float16, device=device()), reference(path, build, torch.float16)
    for _ in range(2):
        assert same(model(IDS["texts"]), plain(IDS["texts"]))
    assert tables(model) and not any(bundle.depth for bundle in model.bundles)


def with_rules(offload):
    return Policy(rules=(Rule("embedding", offload=offload),))


@pytest.mark.parametrize(
    ("build", "policy", "is_one"),
    [
        (Encoder, Policy(), True),
        (Encoder, with_rules("disk"), True),
        (Encoder, with_rules("ram"), False),
        (Encoder, with_rules("pin"), False),
        (lambda: Encoder(max_norm=1.0), Policy(), False),  # torch writes into the rows
    ],
)
def test_what_is_a_table(path, build, policy, is_one):
    model = dynamic(build, path, policy=policy, device=SimDevice())
    assert bool(tables(model)) == is_one


def test_a_small_embedding_and_one_inside_a_block_are_bundles(path, monkeypatch):
    block = DynamicModel(Encoder(), DiskMap(path), "cpu", backend=SimDevice(), blocks=["embedding"])
    assert not tables(block)
    monkeypatch.setattr(table, "LARGE_BYTES", ROWS * WIDTH * 4 + 1)
    assert not tables(dynamic(Encoder, path, device=SimDevice()))


@pytest.mark.parametrize("device", [DEVICES["cpu"], DEVICES["deferred"]], ids=["cpu", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["in place", "cast"])
def test_writes_show_and_are_kept(path, device, dtype):
    model, plain = dynamic(Encoder, path, dtype, device=device()), reference(path, dtype=dtype)
    ids = torch.tensor([[1, 2, 3]])
    assert same(model(ids), plain(ids))
    with torch.no_grad():
        for module in (model.module, plain):
            module.embedding.weight[2:3].fill_(0.5)
    for _ in range(2):
        assert same(model(ids), plain(ids))
        model.release()
    assert tables(model) and same(model.module.state_dict()["embedding.weight"][2], torch.full((WIDTH,), 0.5))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_file_that_has_changed_is_not_read(path, device):
    model = dynamic(Encoder, path, torch.bfloat16, device=device())
    model(IDS["texts"])
    with open(path, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(FileChanged):
        model(IDS["texts"])
    assert not any(bundle.depth or bundle.loan for bundle in model.bundles)


def test_what_memory_refuses_is_tried_again_with_room(path):
    class Full(SimDevice):
        refusals = 0

        def empty(self, nbytes):
            if nbytes == 52 * WIDTH * 4 and self.refusals:
                self.refusals -= 1
                raise torch.OutOfMemoryError("simulated")
            return super().empty(nbytes)

    device = Full()
    model, plain = dynamic(Encoder, path, device=device), reference(path)
    ids = torch.arange(52)
    assert same(model(ids), plain(ids))
    device.refusals = 1
    assert same(model(ids), plain(ids)) and model.ledger.counters.retries == 1
    device.refusals = 1 << 30
    with pytest.raises(torch.OutOfMemoryError):
        model(ids)
    device.refusals = 0
    assert same(model(ids), plain(ids))
    assert model.caster.rows_bytes == 0 and not any(bundle.depth for bundle in model.bundles)


def test_rows_that_were_written_while_they_were_read_are_not_used(path, monkeypatch):
    model = dynamic(Encoder, path, device=SimDevice())
    model(IDS["texts"])
    real = lend_rows.copy_rows

    def copy_rows(*arguments):
        with open(path, "r+b") as file:
            file.seek(-8, 2)
            file.write(b"12345678")
        real(*arguments)

    monkeypatch.setattr(lend_rows, "copy_rows", copy_rows)
    with pytest.raises(FileChanged):
        model(IDS["texts"])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_buffers_give_way_to_rows(path, prefetch):
    """What earlier layers left is no reason to take more than the budget. Rows are counted while they are here."""
    layer = (WIDTH + 2) * WIDTH * 4

    def build():
        return Encoder(depth=9)

    written(path, build)
    device = SimDevice()
    model = dynamic(build, path, device=device, vram_bytes=5 * layer, pinned_bytes=0, prefetch=prefetch)
    plain = reference(path, build)
    ids = torch.arange(WIDTH)
    held = []
    model.module.embedding.register_forward_hook(lambda *_: held.append(device.held()))
    for _ in range(4):
        assert same(model(ids), plain(ids))
        assert device.peak <= 5 * layer and model.peak_bytes >= device.peak
    assert model.plan.offloaded and max(held) <= 5 * layer


def test_an_idle_table_outlives_its_model(path):
    model = dynamic(Encoder, path, torch.bfloat16, device=SimDevice())
    kept, ids = model.module.embedding.weight, torch.tensor([4, 4, 9])
    wanted = F.embedding(ids, kept)
    model.close()
    assert same(F.embedding(ids, kept), wanted) and type(model.module.embedding) is torch.nn.Embedding
    del model
    gc.collect()
    assert same(kept[ids], wanted)


def test_a_source_in_memory_is_a_table_too():
    torch.manual_seed(0)
    state = {key: tensor.detach() for key, tensor in Encoder().state_dict().items()}
    model = dynamic(Encoder, StateDict(state), torch.bfloat16, device=SimDevice())
    got = model.module.embedding(IDS["texts"])
    assert tables(model) and same(got, F.embedding(IDS["texts"], state["embedding.weight"].bfloat16()))
