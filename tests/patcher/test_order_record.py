"""The order in which layers ran is kept in a file, so that a first step of another process need not guess it."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from kit.nets import dynamic, plain, same, write
from kit.shuffled import DEPTH, Shuffled
from kit.sim_device import SimDevice
from spillway.ops.lending.reading import Reading
from spillway.patcher import order_record


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "m.safetensors", Shuffled(0))
    return tmp_path / "m.safetensors"


@pytest.fixture
def read(monkeypatch):
    """How often each bundle was read."""
    counts, fill = Counter(), Reading.fill
    monkeypatch.setattr(Reading, "fill", lambda self: (counts.update([self.bundle.name]), fill(self))[1])
    return counts


def first_step(path, seed, orders_file, steps=1):
    """Run the first steps of a new model, which must give what the plain module gives."""
    model = dynamic(
        lambda: Shuffled(seed),
        path,
        device=SimDevice(eager=True),
        vram_bytes=0,
        pinned_bytes=0,
        orders_file=orders_file,
    )
    reference = plain(lambda: Shuffled(seed), load_file(path), torch.float32)
    for _ in range(steps):
        assert same(model(model.module.input()), reference(reference.input()))
    return model


@pytest.mark.parametrize("seed", range(1, 4))
def test_a_first_step_in_a_known_order_is_read_ahead_from_its_start(path, tmp_path, read, seed):
    orders = tmp_path / "folder" / "orders.json"
    first_step(path, seed, orders, steps=2)
    ((_, noted),) = json.loads(orders.read_text())["orders"].items()
    assert noted == Shuffled(seed).order

    read.clear()
    model = first_step(path, seed, orders)
    assert len(read) == DEPTH
    ahead = len(model.caster.prefetched) + len(model.caster.read_ahead._readings)  # for the next step
    assert read.total() <= DEPTH + ahead, "nothing was read in vain"
    assert model.ledger.counters.prefetched >= DEPTH - 1


def test_an_order_that_is_no_longer_right_is_a_guess_as_any_other(path, tmp_path):
    orders = tmp_path / "orders.json"
    first_step(path, 1, orders, steps=2)
    before = orders.read_text()
    first_step(path, 2, orders, steps=3)  # the same layers
    assert orders.read_text() != before


def test_the_file_is_written_only_where_it_says_something_new(path, tmp_path):
    orders = tmp_path / "orders.json"
    first_step(path, 1, orders, steps=2)
    orders.chmod(0o400)
    before = orders.stat().st_ino
    first_step(path, 1, orders, steps=2)
    assert orders.stat().st_ino == before, "replaced by one that says the same"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        '{"orders": 3}',
        '{"orders": {"KEY": [0, 0, 1]}}',
        '{"orders": {"KEY": [0, 99]}}',
        '{"orders": {"KEY": [-1, 2]}}',
        '{"orders": {"KEY": [true, 1.5]}}',
        '{"orders": {"KEY": "0"}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_record_counts_for_nothing(path, tmp_path, text):
    orders = tmp_path / "orders.json"
    model = first_step(path, 1, None)
    orders.write_text(text.replace("KEY", order_record.structure(model.bundles)))
    assert order_record.read(orders, model.bundles) is None
    first_step(path, 1, orders, steps=2)
    assert order_record.read(orders, model.bundles) is not None


def test_layers_that_did_not_run_come_last(path, tmp_path):
    orders = tmp_path / "orders.json"
    bundles = first_step(path, 1, None).bundles
    order_record.write(orders, bundles, [bundles[2], bundles[1]])
    assert order_record.read(orders, bundles) == [bundles[2], bundles[1], bundles[0], *bundles[3:]]


def test_the_file_stays_small(path, tmp_path):
    orders = tmp_path / "orders.json"
    bundles = first_step(path, 1, None).bundles
    for count in range(1, DEPTH):
        order_record.write(orders, bundles[:count], bundles[:count])
    known = json.loads(orders.read_text())["orders"]
    many = {f"{number:032x}": [0] for number in range(order_record.MOST)}
    orders.write_text(json.dumps({"orders": {**many, **known}}))
    order_record.write(orders, bundles, bundles)
    assert len(json.loads(orders.read_text())["orders"]) == order_record.MOST
    assert order_record.read(orders, bundles[:3]) == bundles[:3], "those noted last are kept"


def test_a_folder_that_cannot_be_written_costs_no_step(path, tmp_path):
    (tmp_path / "file").write_text("")
    first_step(path, 1, tmp_path / "file" / "orders.json", steps=2)
