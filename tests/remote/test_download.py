"""A download that is cut off, lied to or killed loses time and nothing else."""

import errno
import os
import subprocess
import sys
import time
import types

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kit.coming import BLOCK, PAUSES, begin, poison, settle
from kit.pack import ROOT
from kit.range_server import rewrite, serving
from spillway.ops.files.coming_file import ComingFile, coming_file, forget
from spillway.ops.files.safetensors_header import SourceError
from spillway.ops.remote import fetch as fetching
from spillway.ops.remote.block_record import read
from spillway.ops.remote.fetch import DATA, RECORD
from spillway.ops.remote.open_store import open_store
from spillway.ops.remote.order import Order
from spillway.ops.remote.store import Changed, Refused, Unreachable, without_secrets, words_of

SIZE = 40 * BLOCK + 1234
FETCH_FILE = ROOT / "tests" / "kit" / "processes" / "fetch_file.py"


@pytest.fixture
def original(tmp_path):
    (tmp_path / "there").mkdir()
    path = tmp_path / "there" / "model.safetensors"
    path.write_bytes(bytes((number * number // 7) % 251 for number in range(SIZE // 8)) * 8 + b"x" * (SIZE % 8))
    return path


@pytest.fixture
def server(original):
    with serving(original.parent) as server:
        yield server


@pytest.fixture
def path(tmp_path):
    return tmp_path / "models" / "model.safetensors"


def get(address, path):
    return fetching.fetch(address, path, block_bytes=BLOCK, pauses=PAUSES)


def left(path):
    return sorted(one.name.removeprefix(path.name) for one in path.parent.iterdir())


def finish(coming, path, original):
    coming.wait()
    settle(path)
    assert path.read_bytes() == original.read_bytes()
    assert left(path) == [""], "something is left beside the file"


def test_nothing_has_the_files_name_before_it_is_whole(server, original, path):
    coming = begin(server, original.name, path)
    assert left(path) == [RECORD, DATA] and coming_file(path) is coming
    assert os.stat(coming.data).st_size == SIZE
    server.gate.set()
    finish(coming, path, original)
    assert coming_file(path) is None
    assert get(server.address(original.name), path) is None, "a file that is there is fetched again"


def test_blocks_are_taken_in_the_order_of_need():
    coming = ComingFile("", "", 20 * 10, 10)
    order = Order(coming)
    coming.foreseen = [(100, 25), (125, 10), (40, 10)]
    coming.asked = [(70, 15)]
    assert order.take(8) == range(7, 9)  # what somebody waits for, and no more
    assert order.take(2) == range(10, 12)  # what will be asked for
    assert order.take(8) == range(12, 14)  # ranges that follow one another together
    assert order.take(8) == range(4, 5)
    assert order.take(3) == range(0, 3)  # the rest
    order.give_back(range(12, 14))
    assert order.take(8) == range(12, 14)
    assert [order.take(9) for _ in range(5)] == [range(3, 4), range(5, 7), range(9, 10), range(14, 20), None]


@pytest.mark.parametrize("fault", ["no ranges", "other range", "packed", "gone"])
def test_a_server_that_cannot_serve_a_file_is_named_at_once(fault, server, original, path):
    server.fault = fault
    with pytest.raises(Refused, match=rf"127\.0\.0\.1:{server.port}/model\.safetensors: .*(asked for|answered 404)"):
        get(server.address(original.name), path)
    assert not path.parent.exists() or left(path) == []


@pytest.mark.parametrize("fault", ["no ranges", "other range", "gone", "busy", "cut"])
def test_a_server_that_fails_later_is_named_and_what_has_come_is_kept(fault, server, original, path):
    coming = begin(server, original.name, path)
    server.opened = 10 * BLOCK
    coming.wait(0, 5 * BLOCK)
    server.fault = fault
    server.gate.set()
    with pytest.raises(SourceError, match=r"model\.safetensors: .*(the server|bytes \d+ to \d+ could not)") as raised:
        coming.wait()
    if fault in ("busy", "cut"):
        assert isinstance(raised.value, Unreachable) and "in 3 tries" in str(raised.value)
    assert left(path) == [RECORD, DATA]
    server.fault = ""
    server.asked.clear()
    finish(coming, path, original)
    assert sum(last + 1 - first for first, last in server.asked) <= SIZE - 5 * BLOCK, "what had come was brought again"


def test_a_server_that_is_busy_for_a_while_is_asked_again(server, original, path):
    coming = begin(server, original.name, path)
    server.fault = "busy"
    server.gate.set()
    time.sleep(0.005)
    server.fault = ""
    finish(coming, path, original)


def test_a_file_that_changes_is_refused_and_begins_anew(server, original, path):
    coming = begin(server, original.name, path)
    server.opened = 10 * BLOCK
    coming.wait(0, 5 * BLOCK)
    rewrite(original)
    server.gate.set()
    with pytest.raises(Changed, match=r"model\.safetensors: this file changed while it was downloaded"):
        coming.wait()
    with pytest.raises(Changed):
        coming.wait(30 * BLOCK, 1)  # for a model that still lies in it
    assert left(path) == []
    finish(get(server.address(original.name), path), path, original)


def test_a_file_that_became_shorter_is_a_changed_one(server, original, path):
    coming = begin(server, original.name, path)
    server.opened = BLOCK
    coming.wait(0, 1)
    os.truncate(original, BLOCK)
    server.gate.set()
    with pytest.raises(Changed, match="changed while it was downloaded"):
        coming.wait()


@pytest.mark.parametrize("change", ["rewritten", "no marks", "never marks", "record damaged", "data gone", "nothing"])
def test_what_came_to_another_process_counts_only_where_it_is_of_this_file(change, server, original, path):
    """The other process is one whose memory of it is gone."""
    server.marks = change != "never marks"
    coming = begin(server, original.name, path)
    server.opened = 20 * BLOCK
    coming.wait(0, 10 * BLOCK)
    server.fault = "gone"
    server.gate.set()
    with pytest.raises(Refused):
        coming.wait()
    forget(coming)
    running = coming.bring.__self__
    while running._threads:
        time.sleep(0.005)
    running._file.close()
    running._record.close()
    server.fault, server.opened = "", 0
    if change == "rewritten":
        rewrite(original)
    elif change == "no marks":
        server.marks = False
    elif change == "record damaged":
        (path.parent / (path.name + RECORD)).write_bytes(b"\1" * 100)
    elif change == "data gone":
        (path.parent / (path.name + DATA)).unlink()
    coming = begin(server, original.name, path)
    assert (coming.come_bytes >= 10 * BLOCK) == (change == "nothing")
    server.gate.set()
    finish(coming, path, original)


def test_two_processes_do_not_bring_one_file(server, original, path):
    path.parent.mkdir()
    other = fetching._open_locked(path.with_name(path.name + DATA))
    with pytest.raises(SourceError, match="another process downloads this file"):
        get(server.address(original.name), path)
    other.close()
    finish(get(server.address(original.name), path), path, original)


def test_a_file_that_gets_the_name_meanwhile_is_kept(server, original, path):
    coming = begin(server, original.name, path)
    path.write_bytes(b"the user's own")
    server.gate.set()
    coming.wait_whole()
    assert path.read_bytes() == b"the user's own" and left(path) == [""]


def test_no_room_is_said_before_anything_comes(server, original, path, monkeypatch):
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=SIZE))
    with pytest.raises(SourceError, match=r"model\.safetensors: 0\.7 MB are to come, and 0\.7 MB are free"):
        get(server.address(original.name), path)
    assert server.sent <= 1


class FullDisk:
    """A file on a disk that has room for some writes."""

    def __init__(self, file, writes):
        self._file, self._left = file, writes

    def write(self, data):
        if not self._left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._left -= 1
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_disk_that_fills_up_is_named_and_what_has_come_is_kept(server, original, path):
    coming = begin(server, original.name, path)
    running = coming.bring.__self__
    file, running._file = running._file, FullDisk(running._file, 3)
    server.gate.set()
    with pytest.raises(SourceError, match=r"\.spillway-coming: the disk is full\. .* are yet to come"):
        coming.wait()
    assert 0 < coming.come_bytes < SIZE
    running._file = file
    finish(coming, path, original)


def test_the_same_file_from_an_address_that_was_signed_anew_goes_on(server, original, path):
    coming = begin(server, original.name, path)
    assert get(f"{server.address(original.name)}?signature=2", path) is coming
    asked = 0
    while asked != len(server.told):  # requests that wait at the gate are answered after it, those before are not
        asked = len(server.told)
        time.sleep(0.2)
    rewrite(original)
    with pytest.raises(SourceError, match="a file of this name is coming from"):
        get(f"{server.address(original.name)}?signature=3", path)
    server.gate.set()
    with pytest.raises(Changed):
        coming.wait()


def test_no_error_and_no_log_tells_a_password_or_a_signature(server, path, caplog):
    address = f"http://user:secret@127.0.0.1:{server.port}/none?signature=hidden"
    with pytest.raises(Refused) as raised:
        get(address, path)
    assert "none: the server answered 404" in str(raised.value)
    assert not any(word in str(raised.value) + caplog.text for word in ("secret", "hidden", "user"))


def test_what_is_secret_in_any_address_is_not_told(tmp_path):
    chain = "zip://model.safetensors::simplecache::https://user:secret@server/f.zip?signature=hidden"
    assert without_secrets(chain) == "zip://model.safetensors::simplecache::https://server/f.zip"
    said = words_of(OSError("cannot open https://user:secret@server/f?signature=hidden here"))
    assert said == "OSError: cannot open https://server/f?... here"
    for address in ("http://127.0.0.1/f?sig=hidden x", "http://user:pa/ss@server/f"):
        with pytest.raises(Refused) as raised:
            open_store(address).state()
        assert "hidden" not in str(raised.value) and "pa'" not in str(raised.value)


def test_a_host_is_told_what_was_given_for_it_alone(server, original, tmp_path, monkeypatch):
    """Whoever made a workflow chooses its addresses."""
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine elsewhere login me password token\ndefault login any password any\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer token"}})
    open_store(server.address(original.name)).state()
    assert "Authorization" not in server.told[-1]
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password token\n")
    open_store(server.address(original.name)).state()
    assert server.told[-1]["Authorization"] == "Basic bWU6dG9rZW4="


def test_one_answer_of_another_file_does_not_end_a_download(server, original, path):
    coming = begin(server, original.name, path)
    server.fault = "other file"
    server.gate.set()
    finish(coming, path, original)
    assert server.fault == ""


def test_a_link_to_nothing_is_refused_before_anything_comes(server, original, path):
    path.parent.mkdir()
    path.symlink_to(path.parent / "gone.safetensors")
    with pytest.raises(SourceError, match="a link to a file that is gone"):
        get(server.address(original.name), path)
    assert not server.told


def test_a_sparse_file_that_was_removed_at_the_last_moment_comes_again(server, original, path):
    coming = begin(server, original.name, path)
    path.with_name(path.name + DATA).unlink()
    server.gate.set()
    with pytest.raises(SourceError, match="cannot get its name"):
        fetching.wait_for(coming, lambda done, total: None)
    fetching.token(path)
    finish(get(server.address(original.name), path), path, original)


def test_the_report_says_how_far_each_file_is_and_why_no_more_comes(server, original, path):
    assert fetching.now_coming() == []
    coming = begin(server, original.name, path)
    (told,) = fetching.now_coming()
    assert told == {
        "file": path.name,
        "address": server.address(original.name),
        "come_bytes": 0,
        "total_bytes": SIZE,
        "speed": 0.0,
        "stopped": None,
    }
    server.opened = 10 * BLOCK
    coming.wait(0, 5 * BLOCK)
    (told,) = fetching.now_coming()
    assert told["come_bytes"] >= 5 * BLOCK and told["come_bytes"] == coming.come_bytes
    server.fault = "busy"
    server.gate.set()
    with pytest.raises(Unreachable):
        coming.wait()
    (told,) = fetching.now_coming()
    assert "could not be brought, in 3 tries" in told["stopped"] and told["speed"] == 0.0
    server.fault, server.rate = "", 0.5e6
    end = time.monotonic() + 20
    while told["stopped"] or not told["speed"]:  # threads that were under way may end first
        assert time.monotonic() < end
        coming.bring()
        time.sleep(0.01)
        (told,) = fetching.now_coming()
    server.rate = float("inf")
    finish(coming, path, original)
    assert fetching.now_coming() == []


# -- any moment


def test_a_process_that_is_killed_at_any_moment_forgets_and_never_invents(server, original, path):
    size, moments = SIZE, 10
    server.rate = 1.5e6
    path.parent.mkdir()
    data, record = path.with_name(path.name + DATA), path.with_name(path.name + RECORD)
    wanted, state = original.read_bytes(), open_store(server.address(original.name)).state()
    kept = []
    for moment in range(moments):
        process = subprocess.Popen(
            [sys.executable, FETCH_FILE, server.address(original.name), path], stdout=subprocess.PIPE, text=True
        )
        if moment:
            assert process.stdout.readline() == "began\n"
            time.sleep(0.013 * moment % 0.05 + 0.01)
        else:
            time.sleep(0.15)  # before it has begun, perhaps
        process.kill()
        process.wait()
        process.stdout.close()
        assert not path.exists(), "a file that is not whole has its name"
        found = read(record, state, BLOCK)
        come = found[1] if found is not None else bytes(-(-size // BLOCK))
        if found is not None:
            found[0].close()
            held = data.read_bytes()
            for block in (number for number, there in enumerate(come) if there):
                place = slice(block * BLOCK, (block + 1) * BLOCK)
                assert held[place] == wanted[place], f"kill {moment}: block {block} is said to be there"
            hole = ComingFile(path, data, size, BLOCK)
            hole.come[:] = come
            poison(hole)
        kept.append(sum(come))
    assert kept == sorted(kept) and kept[-1] > 3, kept
    server.rate = float("inf")
    server.asked.clear()
    subprocess.run([sys.executable, FETCH_FILE, server.address(original.name), path], check=True, capture_output=True)
    assert path.read_bytes() == wanted and left(path) == [""]
    assert (
        sum(last + 1 - first for first, last in server.asked) <= size - (kept[-1] - 4) * BLOCK
    )  # some may be asked for twice


# -- addresses that fsspec knows


@pytest.fixture
def memory(original):
    MemoryFileSystem.store.clear()
    fsspec.filesystem("memory").pipe("/models/model.safetensors", original.read_bytes())
    yield "memory://models/model.safetensors"
    MemoryFileSystem.store.clear()


def test_files_come_from_wherever_fsspec_reaches(memory, original, path, tmp_path):
    finish(get(memory, path), path, original)
    other = tmp_path / "models2" / "model.safetensors"
    finish(get(original.as_uri(), other), other, original)


def test_a_range_that_was_read_of_another_content_is_refused(memory, original):
    store = open_store(memory)
    state = store.state()
    assert store.read(100, 50, state) == original.read_bytes()[100:150]
    time.sleep(0.001)
    fsspec.filesystem("memory").pipe("/models/model.safetensors", original.read_bytes()[::-1])
    with pytest.raises(Changed):
        store.read(100, 50, state)


def test_drivers_with_one_connection_are_asked_by_one_thread_at_a_time(memory, original, path):
    class OneConnection(MemoryFileSystem):
        protocol, busy, most = "oneconnection", 0, 0

        @classmethod
        def _strip_protocol(cls, path):
            return "/models/model.safetensors"

        def cat_file(self, *args, **kwargs):
            OneConnection.busy += 1
            OneConnection.most = max(OneConnection.most, OneConnection.busy)
            time.sleep(0.002)
            OneConnection.busy -= 1
            return super().cat_file(*args, **kwargs)

    fsspec.register_implementation("oneconnection", OneConnection, clobber=True)
    finish(get("oneconnection://models/model.safetensors", path), path, original)
    assert OneConnection.most == 1


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("", "no address was given"),
        ("memory://models/none.safetensors", "there is no such file"),
        ("nonsense://a/b", "fsspec does not know this kind of address"),
        ("nodriver://a/b", r"driver for this kind of address is missing .* pip install no_such_module`"),
        ("http:///x", "no address|no host"),
    ],
)
def test_an_address_that_leads_nowhere_says_why(address, words, path):
    fsspec.register_implementation("nodriver", "no_such_module.FileSystem", errtxt="Install nodriver", clobber=True)
    with pytest.raises(SourceError, match=words):
        fetching.fetch(address, path, pauses=PAUSES)
