"""A shared store in a bucket of S3: whole objects, ranges, eviction by S3's times, and a server that goes."""

import asyncio
import time

import pytest
import torch

from kit.s3_server import BUCKET, S3Server
from spillway.cache.disk_format import describe
from spillway.cache.store.place import RANGE
from spillway.cache.store.shared_store import Options, SharedStore
from spillway.ops.ledger import Ledger

MIB = 1 << 20
NAMES = [f"{number:064x}" for number in range(8)]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3") / "log") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        yield server


def member(prefix, bucket=BUCKET, **options):
    return SharedStore(Options(f"s3://{bucket}/{prefix}", wait_seconds=20, **options), Ledger("shared store"))


def put(store, name, size):
    found = describe([[torch.arange(size, dtype=torch.int64).to(torch.uint8)]])
    return store.store(store.name(name), found, seconds=20.0, kind="Node", stamps=None, stop=lambda: False)


def get(store, name):
    found = asyncio.run(store.load(store.name(name)))
    return found and found[0][0][0]


def test_entries_come_back_and_the_oldest_go(s3):
    writer, reader = (member("some/prefix", key="correct horse") for _ in range(2))
    size = RANGE + MIB
    assert get(reader, NAMES[0]) is None and put(writer, NAMES[0], size)
    assert torch.equal(get(reader, NAMES[0]), torch.arange(size, dtype=torch.int64).to(torch.uint8))
    assert get(member("some/prefix", key="another one"), NAMES[0]) is None
    time.sleep(1.1)  # S3's times are whole seconds
    assert put(writer, NAMES[1], MIB)
    small = member("some/prefix", key="correct horse", cap=4 * MIB, days=1.0)
    assert put(small, NAMES[2], MIB) and small.counts.evicted == 1
    assert [get(reader, name) is not None for name in NAMES[:3]] == [False, True, True]
    assert not writer.state and not reader.state and not small.state


def test_what_is_damaged_is_written_anew(s3):
    store = member("damaged")
    assert put(store, NAMES[0], 1000)
    (file,) = store.place.files()
    with store.place._driver() as (driver, _):
        driver.pipe_file(file.path, driver.cat_file(file.path)[:-9])
    assert get(store, NAMES[0]) is None and store.counts.refused == 1 and len(store.place.files()) == 1
    assert put(store, NAMES[0], 1000) and get(store, NAMES[0]) is not None


def test_a_bucket_that_is_missing_and_a_server_that_goes(s3, caplog):
    store = member("x", bucket="there-is-none")
    assert get(store, NAMES[0]) is None and not any(put(store, name, 10) for name in NAMES[:3])
    assert "cannot be written to" in caplog.text and "there-is-none" in caplog.text
    store = SharedStore(Options(f"s3://{BUCKET}/y", wait_seconds=1), Ledger("shared store"))
    assert put(store, NAMES[0], 10)
    s3.process.terminate()
    s3.process.wait(20)
    begun = time.monotonic()
    assert get(store, NAMES[0]) is None and time.monotonic() - begun < 5
    assert store.state
