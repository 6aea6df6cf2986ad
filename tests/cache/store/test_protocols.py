"""A shared store, and a model that comes, at real servers of SFTP, SMB and Google's storage on this machine."""

import asyncio
import threading
import time

import pytest
import torch

from kit.coming import settle
from kit.store_servers import StoreServer
from spillway.cache.disk_format import describe
from spillway.cache.store.place import RANGE
from spillway.cache.store.shared_store import Options, SharedStore
from spillway.ops.ledger import Ledger
from spillway.ops.remote.fetch import fetch

pytestmark = pytest.mark.slow
MIB = 1 << 20
NAMES = [f"{number:064x}" for number in range(16)]
KEY = "correct horse"


@pytest.fixture(params=["sftp", "smb", "gs"])
def server(request, tmp_path, monkeypatch):
    with StoreServer(request.param, tmp_path / "there") as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        yield server


def member(server, key=KEY, wait_seconds=30.0, **options):
    return SharedStore(Options(server.address, key, wait_seconds=wait_seconds, **options), Ledger("shared store"))


def numbers(size):
    return torch.arange(size, dtype=torch.int64).to(torch.uint8)


def put(store, name, size):
    outputs = describe([[numbers(size)]])
    return store.store(store.name(name), outputs, seconds=20.0, kind="Node", stamps=None, stop=lambda: False)


def get(store, name):
    store.begin_prompt()
    found = asyncio.run(store.load(store.name(name)))
    return found and found[0][0][0]


def test_entries_come_back_are_replaced_where_damaged_and_the_oldest_go(server):
    writer, reader = member(server), member(server)
    assert [get(reader, name) for name in NAMES[:4]] == [None] * 4 and reader.state is None
    assert put(writer, NAMES[0], RANGE + MIB) and torch.equal(get(reader, NAMES[0]), numbers(RANGE + MIB))
    assert get(member(server, key="another one"), NAMES[0]) is None
    assert not put(reader, NAMES[0], RANGE + MIB), "it is there"
    time.sleep(1.1)  # some have whole seconds
    assert put(writer, NAMES[1], MIB)
    small = member(server, cap=4 * MIB, days=1.0)
    assert put(small, NAMES[2], MIB) and small.counts.evicted == 1
    assert [get(reader, name) is not None for name in NAMES[:3]] == [False, True, True]
    path = next(file.path for file in reader.place.files() if reader.name(NAMES[1]) in file.path)
    with reader.place._driver() as (driver, _):
        driver.pipe_file(path, driver.cat_file(path)[:-9])
    fresh = member(server)
    assert get(fresh, NAMES[1]) is None and fresh.counts.refused == 1
    assert put(fresh, NAMES[1], MIB) and torch.equal(get(reader, NAMES[1]), numbers(MIB))
    assert [store.state for store in (writer, reader, small, fresh)] == [None] * 4


def test_members_read_and_write_at_once(server):
    stores = [member(server) for _ in range(3)]
    for number, name in enumerate(NAMES[:4]):
        assert put(stores[number % 3], name, MIB)

    async def all_at_once():
        asked = [store.load(store.name(name)) for store in stores for name in NAMES[:4] * 2]
        return await asyncio.gather(*asked)

    found = asyncio.run(all_at_once())
    assert all(one is not None and torch.equal(one[0][0][0], numbers(MIB)) for one in found)
    assert not any(store.state for store in stores)


def test_a_server_that_goes_costs_no_more_than_the_limit(server):
    store = member(server, wait_seconds=2.0)
    assert put(store, NAMES[0], MIB)
    server.stop()
    for name in NAMES[:5]:
        begun = time.monotonic()
        assert get(store, name) is None and time.monotonic() - begun < 4
    assert store.state and "secret" not in store.state and "install" not in store.state


def test_a_server_that_is_killed_while_it_is_written_to_leaves_no_half_entry(server, tmp_path):
    """Neither where its folder lies on a disk, nor in what the writer believes."""
    store = member(server)
    assert put(store, NAMES[0], MIB), "it is connected"
    killer = threading.Timer(0.15, server.stop)
    killer.start()
    written = put(store, NAMES[1], 64 * MIB)
    killer.join()
    assert not written and store.counts.written == 1
    names = [path.name for path in (tmp_path / "there").rglob("*.output")]
    assert store.name(NAMES[1]) not in "".join(names)


def test_a_model_comes_from_there(server, tmp_path):
    wanted = bytes(numbers(3 * MIB).numpy())
    store = member(server)
    with store.place._driver() as (driver, root):
        driver.pipe_file(f"{root.rpartition('/')[0]}/model.safetensors", wanted)
    path = tmp_path / "models" / "model.safetensors"
    coming = fetch(f"{server.address}/model.safetensors", path)
    assert server.address.startswith("gs") or "secret" not in coming.bring.__self__.as_dict()["address"]
    coming.wait()
    settle(path)
    assert path.read_bytes() == wanted
