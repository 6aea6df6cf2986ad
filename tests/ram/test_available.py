"""The RAM that the process can have: cgroup files of both versions, PSI, the variable, the allocator."""

import sys
import types

import psutil
import pytest
import torch

from kit.own_process import in_own_process
from spillway.ops.ram import allocator, available, cgroup

GIB = 1 << 30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "31 23 0:27 {root} /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n"


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


@pytest.fixture(autouse=True)
def forget():
    cgroup.folders.cache_clear()
    yield
    cgroup.folders.cache_clear()


def test_version_2_takes_the_tightest_of_the_groups_above(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user/app\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/user/memory.max": 4 * GIB,
            "sys/fs/cgroup/user/memory.current": 3 * GIB,
            "sys/fs/cgroup/user/memory.stat": f"anon 1\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\n",
            "sys/fs/cgroup/user/app/memory.max": "max",
            "sys/fs/cgroup/user/app/memory.current": 2 * GIB,
        },
    )
    group = cgroup.tightest(root)
    assert group.path.endswith("/user") and group.limit == 4 * GIB
    assert group.available == GIB + GIB // 2 + GIB // 4, "pages of files can all be taken back"


def test_version_2_minds_the_high_mark(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/memory.max": 8 * GIB,
        "sys/fs/cgroup/memory.high": 6 * GIB,
        "sys/fs/cgroup/memory.current": 5 * GIB,
    }
    assert cgroup.tightest(write(tmp_path, files)).available == GIB


def test_version_1_in_a_container_whose_path_is_told_from_outside(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/abc\n0::/\n",
            "proc/self/mountinfo": V1.format(root="/docker/abc") + "garbage\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 4 * GIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 5 * GIB,
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB}\nother x\n",
        },
    )
    assert cgroup.tightest(root).available == 0
    assert available.available_ram(root).available == 0
    assert available.unused_ram(root) == 0
    told = available.available_ram(root)
    assert "cgroup" in told.reason and told.kind == "cgroup"


def test_no_limit_and_no_files(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/\n",
        "proc/self/mountinfo": V1.format(root="/"),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 5,
    }
    assert cgroup.tightest(write(tmp_path / "a", files)) is None
    assert cgroup.tightest(tmp_path / "nothing") is None
    assert available.available_ram(tmp_path / "nothing").total == psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="PSI is Linux's")
@pytest.mark.parametrize(("avg10", "share"), [("0.00", 1.0), ("9.00", 1.0), ("25.00", 0.5), ("80.00", 0.0)])
def test_pressure_makes_less_available(tmp_path, avg10, share):
    line = f"some avg10={avg10} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    root = write(tmp_path, {"proc/pressure/memory": line})
    found = available.available_ram(root)
    assert found.available == pytest.approx(psutil.virtual_memory().available * share, rel=0.1)
    assert ("waited for memory" in found.reason) == (share < 1)
    assert found.stalled == (float(avg10) / 100 if share < 1 else 0) and found.kind == "machine"


def test_a_groups_own_pressure_comes_first(tmp_path):
    write(tmp_path, {"proc/pressure/memory": "some avg10=0.00", "g/memory.pressure": "some avg10=60.00 total=1"})
    group = cgroup.Group(str(tmp_path / "g"), GIB, 0, 0)
    assert available.memory_stall(tmp_path, group) == 0.6


def test_the_variable_limits_this_process(monkeypatch):
    monkeypatch.setenv("SPILLWAY_RAM_GB", "3")
    before = available.available_ram()
    assert available.total_ram() == before.total == 3 * GIB and "SPILLWAY_RAM_GB" in before.reason
    assert before.kind == "variable"
    held = torch.ones(1 << 28, dtype=torch.uint8)
    taken = before.available - available.available_ram().available
    assert taken == pytest.approx(held.numel(), rel=0.1)


def test_the_commit_limit_is_read_on_windows(monkeypatch):
    """The call of another system is all that is replaced."""

    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(reference):
            status = reference._obj
            assert status.length == 64
            status.page, status.avail_page = 20 * GIB, 3 * GIB
            return 1

    monkeypatch.setattr(available.ctypes, "windll", type("Windll", (), {"kernel32": Kernel}), raising=False)
    assert available.commit_limit() == (3 * GIB, 20 * GIB)


needs_glibc = pytest.mark.skipif(allocator._libc() is None, reason="glibc's allocator")


@needs_glibc
def test_freed_memory_goes_back_to_the_system():
    blocks = [torch.ones(64 << 10, dtype=torch.uint8) for _ in range(4000)]
    keep = blocks[::500]
    del blocks
    before = psutil.Process().memory_info().rss
    assert allocator.trim()
    assert before - psutil.Process().memory_info().rss > 50 << 20
    assert len(keep) == 8
    figures = allocator.arenas()
    assert set(figures) == {"arenas", "used", "free", "mapped"} and figures["used"] > 0


@pytest.mark.parametrize("libc", [None, types.SimpleNamespace(malloc_trim=lambda _: 0)], ids=["none", "an old one"])
def test_a_library_without_figures_gives_none(libc, monkeypatch):
    """glibc has mallinfo2 from 2.33 on. Other libraries have neither that nor malloc_trim."""
    monkeypatch.setattr(allocator, "_libc", lambda: libc)
    assert allocator.arenas() == {}
    assert allocator.trim() is False


PRESTART = "import runpy, sys; runpy.run_path('prestartup_script.py'); "
WORDS = PRESTART + "print('torch' in sys.modules, sys.modules['spillway_allocator'].done)"


@needs_glibc
def test_prestartup_tunes_before_torch():
    assert in_own_process(WORDS) == "False mmap threshold fixed at 4 MiB, trim threshold too"
    grows = PRESTART + (
        "import torch, psutil\nrss = psutil.Process().memory_info\n"
        "for _ in range(3):\n    held = [torch.ones(6 << 20, dtype=torch.uint8) for _ in range(20)]; del held\n"
        "held = [torch.ones(6 << 20, dtype=torch.uint8) for _ in range(20)]; before = rss().rss; del held\n"
        "print(before - rss().rss > 100 << 20)"
    )
    assert in_own_process(grows) == "True", "blocks of 6 MiB go back as they are freed"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("environment", "words"),
    [({"SPILLWAY_ALLOCATOR": "0"}, "SPILLWAY_ALLOCATOR=0"), ({"MALLOC_MMAP_THRESHOLD_": "65536"}, "is set")],
)
def test_prestartup_leaves_the_users_choice(environment, words):
    assert words in in_own_process(WORDS, **environment)
