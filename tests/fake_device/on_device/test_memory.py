"""Memory of the fake device: counted to the byte, poisoned, refused at its capacity, page-locked on the host."""

import gc

import pytest
import torch

MIB = 1 << 20


def test_bytes_in_use_are_exact(fake):
    before, torch_before = fake.memory("used"), torch.cuda.memory_allocated()
    tensor = torch.empty(1000, device="cuda")
    assert fake.memory("used") - before == 4096 == torch.cuda.memory_allocated() - torch_before
    view = tensor[10:]
    del tensor
    assert fake.memory("used") - before == 4096
    del view
    assert fake.memory("used") == before
    total = (tensor := torch.ones(MIB, device="cuda")).sum()
    assert fake.memory("peak") - before >= 4 * MIB
    del tensor, total
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated() == before


def test_results_and_workspaces_are_counted(fake):
    data = torch.ones(256, 1024, device="cuda")
    before = fake.memory("used")
    results = [data + 1, data @ data.T, data.to(torch.bfloat16), *data.sort()]
    expected = sum(result.numel() * result.element_size() for result in results)
    assert fake.memory("used") - before == expected
    del results
    gc.collect()
    assert fake.memory("used") == before


def test_each_device_has_its_own(fake):
    before = fake.memory("used", 0), fake.memory("used", 1)
    tensor = torch.ones(MIB, device="cuda:1")
    assert (fake.memory("used", 0), fake.memory("used", 1)) == (before[0], before[1] + 4 * MIB)
    fake.set(1, capacity=64 * MIB)
    assert torch.cuda.mem_get_info(1)[1] == 64 * MIB != torch.cuda.mem_get_info(0)[1]
    assert torch.cuda.get_device_properties(1).total_memory == 64 * MIB
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(64 * MIB, device="cuda:1")
    assert torch.empty(64 * MIB, device="cuda:0").device.index == 0
    del tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_fresh_and_freed_memory_is_poison(fake, dtype):
    assert torch.empty(1000, dtype=dtype, device="cuda").float().isnan().all()
    tensor = torch.zeros(1000, dtype=dtype, device="cuda")
    address = tensor.data_ptr()
    del tensor
    again = torch.empty(1000, dtype=dtype, device="cuda")
    assert again.data_ptr() == address, "the block is used again"
    assert again.float().isnan().all()


def test_out_of_memory_at_the_capacity(fake):
    with fake.room(10 * MIB):
        kept = torch.ones(8 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory.*8388608 bytes"):
            kept + 1
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        assert int(kept.sum(dtype=torch.int64)) == 8 * MIB
        assert fake.memory("refused") >= 2
        del kept
        assert torch.ones(9 * MIB, dtype=torch.uint8, device="cuda").numel() == 9 * MIB


def test_what_is_kept_for_reuse_gives_way(fake):
    with fake.room(10 * MIB):
        free = torch.cuda.mem_get_info()[0]
        del (tensor := [torch.ones(9 * MIB, dtype=torch.uint8, device="cuda")])[:]
        idle = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        assert idle == 9 * MIB and torch.cuda.mem_get_info()[0] == free - idle and not tensor
        assert torch.ones(8 * MIB, dtype=torch.uint8, device="cuda").numel() == 8 * MIB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated()


def test_other_processes_take_memory(fake):
    free, total = torch.cuda.mem_get_info()
    fake.set(others=100 * MIB)
    assert torch.cuda.mem_get_info() == (free - 100 * MIB, total)
    fake.set(others=0)


def test_the_nth_allocation_fails(fake):
    data = torch.ones(1000, device="cuda")
    for n in range(1, 4):
        fake.fail_at(n)
        results = [data.clone() for _ in range(n - 1)]
        with pytest.raises(torch.OutOfMemoryError, match="as a test asked for"):
            data.clone()
        assert all(torch.equal(result, data) for result in results)
        assert torch.equal(data.clone(), data), "only one fails"


def test_page_locked_memory(fake):
    tensor = torch.empty(4 * MIB, dtype=torch.uint8)
    assert not tensor.is_pinned()
    assert torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 1) == 0
    assert tensor.is_pinned() and fake.get("pinned") == 4 * MIB
    assert torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()) == 0
    assert not tensor.is_pinned() and torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr()) != 0
    assert torch.empty(10, pin_memory=True).is_pinned() and tensor[:10].pin_memory().is_pinned()
    assert fake.get("pinned") == 0
    fake.set(pin_limit=MIB)
    assert torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.numel(), 1) != 0
    fake.set(pin_limit=1 << 62)


def test_figures_of_torch(fake):
    stats = torch.cuda.memory_stats(0)
    assert stats["active_bytes.all.current"] == torch.cuda.memory_allocated(torch.device("cuda", 0))
    assert stats["reserved_bytes.all.current"] == torch.cuda.memory_reserved("cuda:0")
    assert torch.cuda.is_available() and torch.cuda.device_count() == 2
    assert torch.cuda.get_device_name() and torch.cuda.get_device_capability(1) == (8, 9)
