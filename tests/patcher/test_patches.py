"""Patches: the bits of the plainly patched module at every budget, computed as seldom as the memory allows."""

import gc

import pytest
import torch

from kit.nets import Stack, budget, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.patcher.policy import Rule

DEPTH = 8
ALL = 1 << 40
DEVICES = {"cpu": lambda: None, "deferred": SimDevice, "overtaking": lambda: SimDevice(eager="some")}
BUDGETS = [None, 0.8, 0.5, 0.0]


def build():
    return Stack(DEPTH)


def lora(key, width=128, rank=4):
    """A low-rank change that differs from key to key."""
    generator = torch.Generator().manual_seed(sum(key.encode()))
    up, down = torch.randn(width, rank, generator=generator), torch.randn(rank, width, generator=generator)

    def patch(weight):
        return (weight.float() + (up @ down) * 0.01).to(weight.dtype)

    return patch


def loras(*layers):
    return {f"layers.{index}.weight": lora(f"layers.{index}.weight") for index in layers or range(DEPTH)}


def patched_plainly(state, dtype, patches):
    module = plain(build, state, dtype)
    for key, patch in patches.items():
        parameter = module.get_parameter(key)
        parameter.data = patch(parameter.data)
    return module(module.input())


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


@pytest.fixture(params=BUDGETS)
def fraction(request):
    return request.param


@pytest.fixture(params=[0.0, 0.5, 2.0], ids=["no pins", "half pinned", "all pinned"])
def pins(request):
    return request.param


def made(tmp_path, device, fraction=None, pins=0.0, file_dtype=torch.float32, dtype=torch.float32, **policy):
    """A dynamic model, and the tensors of its file."""
    state = write(tmp_path / "m.safetensors", build(), file_dtype)
    model = dynamic(build, tmp_path / "m.safetensors", dtype, device=device, **policy)
    model.set_policy(model.policy.with_changes(vram_bytes=budget(model, fraction), pinned_bytes=budget(model, pins)))
    return model, state


def run(model):
    return model(model.module.input())


@pytest.mark.parametrize(
    ("file_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_a_patched_model_has_the_bits_of_the_plainly_patched_one(tmp_path, device, fraction, pins, file_dtype, dtype):
    model, state = made(tmp_path, device, fraction, pins, file_dtype, dtype)
    assert model.set_patches(loras()) == DEPTH
    expected = patched_plainly(state, dtype, loras())
    assert not same(expected, patched_plainly(state, dtype, {}))
    assert all(same(run(model), expected) for _ in range(3))


def test_patches_come_change_and_go_between_steps(tmp_path, device, fraction, pins):
    model, state = made(tmp_path, device, fraction, pins)
    others = {key: lora(key + "other") for key in loras(2, 3)}
    for patches in ({}, loras(), others, loras(0), {}, loras(), {}):
        model.set_patches(patches)
        expected = patched_plainly(state, torch.float32, patches)
        assert all(same(run(model), expected) for _ in range(2))


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("streams", [1, 2, 3])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 4])
@pytest.mark.parametrize("eager", [False, "some"], ids=["deferred", "overtaking"])
def test_a_patched_weight_may_be_wanted_again_while_it_is_written_back(tmp_path, depth, streams, prefetch, eager):
    state = write(tmp_path / "m.safetensors", Stack(depth, 32))
    device = SimDevice(eager=eager, streams=streams)
    fields = {"streams": streams, "prefetch": prefetch, "vram_bytes": 0, "pinned_bytes": ALL}
    model = dynamic(lambda: Stack(depth, 32), tmp_path / "m.safetensors", device=device, **fields)
    model.set_patches({f"layers.{index}.weight": torch.neg for index in range(depth)})
    reference = plain(lambda: Stack(depth, 32), state, torch.float32)
    for layer in reference.layers:
        layer.weight.data.neg_()
    assert all(same(run(model), reference(reference.input())) for _ in range(4))


@pytest.mark.parametrize("place", ["resident", "pinned"])
def test_a_patch_is_computed_once_where_its_result_can_be_kept(tmp_path, device, place):
    model, _ = made(tmp_path, device, None if place == "resident" else 0.0, 0.0 if place == "resident" else 2.0)
    model.set_patches(loras())
    for _ in range(4):
        run(model)
    assert model.ledger.counters.patched == DEPTH


@pytest.mark.parametrize(
    ("file_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)],
)
def test_a_patched_model_moves_no_more_bytes(tmp_path, device, fraction, file_dtype, dtype):
    moved = {}
    for name, patches in (("plain", {}), ("patched", loras())):
        (tmp_path / name).mkdir()
        model, _ = made(tmp_path / name, device, fraction, 2.0, file_dtype, dtype)
        model.set_patches(patches)
        # The first run traces the order and computes the patches. Their temporary memory was set aside; the second run
        # brings what fits there from then on.
        run(model), run(model)
        counters = model.ledger.counters
        before = (counters.bytes_streamed + counters.bytes_loaded, counters.bytes_written_back, counters.patched)
        run(model)
        after = (counters.bytes_streamed + counters.bytes_loaded, counters.bytes_written_back, counters.patched)
        moved[name] = [now - then for now, then in zip(after, before, strict=True)]
        model.close()
    assert moved["patched"][0] <= moved["plain"][0]  # less where a finished form spares a cast
    assert moved["patched"][1:] == [0, 0]


def test_a_patch_is_computed_once_by_default_also_on_a_cpu_without_room(tmp_path):
    write(tmp_path / "m.safetensors", build())
    model = dynamic(build, tmp_path / "m.safetensors", vram_bytes=0)
    run(model)
    assert model.pinned_bytes == 0  # what is used where it lies needs no pin
    model.set_patches(loras())
    for _ in range(3):
        run(model)
    assert model.ledger.counters.patched == DEPTH


def test_patches_that_alternate_evict_nothing(tmp_path, device, fraction):
    """As hooks do, within every step: what they do not touch stays where it is."""
    model, _ = made(tmp_path, device, fraction, 2.0)
    run(model), run(model)
    counters, resident = model.ledger.counters, model.resident_bytes
    evicted = counters.evictions
    patches = {"layers.3.weight": lora("layers.3.weight")}
    for _ in range(3):
        model.set_patches(patches, changed=patches)
        run(model)
        model.set_patches({}, changed=patches)
        run(model)
    assert counters.evictions == evicted and model.resident_bytes == resident


def test_a_changed_patch_touches_its_own_bundle_only(tmp_path, device):
    model, state = made(tmp_path, device)
    model.set_patches(loras())
    run(model)
    before = vars(model.ledger.counters).copy()
    patches = {**loras(), "layers.3.weight": lora("another")}
    assert model.set_patches(patches, changed=["layers.3.weight"]) == 1
    assert same(run(model), patched_plainly(state, torch.float32, patches))
    after = model.ledger.counters
    assert after.patched - before["patched"] == 1
    assert after.bytes_loaded - before["bytes_loaded"] == model.bundles[3].nbytes


def test_without_patches_nothing_is_touched(tmp_path, device):
    model, _ = made(tmp_path, device)
    run(model)
    loaded = model.ledger.counters.bytes_loaded
    assert model.set_patches({}) == 0
    run(model)
    assert model.ledger.counters.bytes_loaded == loaded


def test_a_patch_for_a_key_that_the_model_lacks_touches_nothing(tmp_path, device):
    model, state = made(tmp_path, device)
    assert model.set_patches({"layers.99.weight": lora("x")}) == 0
    assert same(run(model), patched_plainly(state, torch.float32, {}))


def test_weight_and_bias_of_one_bundle_may_both_be_patched(tmp_path, device, fraction):
    model, state = made(tmp_path, device, fraction)
    patches = {**loras(1), "layers.1.bias": torch.neg, "layers.2.bias": torch.neg}
    assert model.set_patches(patches) == 2
    assert all(same(run(model), patched_plainly(state, torch.float32, patches)) for _ in range(2))


def test_a_patch_that_writes_into_its_input_does_not_change_the_source(tmp_path, device, fraction, pins):
    model, state = made(tmp_path, device, fraction, pins)
    content = (tmp_path / "m.safetensors").read_bytes()
    model.set_patches({"layers.1.weight": lambda weight: weight.mul_(2)})
    run(model)
    expected = patched_plainly(state, torch.float32, {"layers.1.weight": lambda weight: weight * 2})
    assert all(same(run(model), expected) for _ in range(2))
    model.set_patches({})
    assert same(run(model), patched_plainly(state, torch.float32, {}))
    assert (tmp_path / "m.safetensors").read_bytes() == content


def test_a_weight_stored_in_fp8_is_patched_in_the_dtype_of_the_model(tmp_path, device, fraction):
    rules = (Rule("layers.*", storage_dtype=torch.float8_e4m3fn),)
    model, state = made(tmp_path, device, fraction, file_dtype=torch.bfloat16, rules=rules)
    seen = []

    def patch(weight):
        seen.append(weight.dtype)
        return weight + 0.01

    model.set_patches({"layers.1.weight": patch})
    module = plain(build, state, torch.float32)
    for key, parameter in module.named_parameters():
        if key == "layers.1.weight":
            parameter.data += 0.01
        parameter.data = parameter.to(torch.float8_e4m3fn).float()
    assert all(same(run(model), module(module.input())) for _ in range(2))
    assert set(seen) == {torch.float32}


def test_removed_patches_give_their_memory_back_on_the_cpu(tmp_path):
    model, _ = made(tmp_path, None)
    run(model)

    def held():
        gc.collect()
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and not tensor.is_meta and tensor.dtype == torch.uint8
        }
        return {place: data for place, data in storages.items() if data.nbytes() == model.bundles[0].nbytes}

    before = held()  # kept, as what other tests have left may go at any time, and its addresses be used again
    model.set_patches(loras())
    run(model)
    patched = held()
    assert sum(patched[place].nbytes() for place in patched.keys() - before.keys()) == model.total_bytes
    del patched
    model.set_patches({})
    run(model)
    assert not held().keys() - before.keys()
