"""The life of a dynamic model: made, run, released, closed."""

import re

import pytest
import torch
from safetensors.torch import save_file

from kit.nets import AnyLinear, Blocks, Stack, dynamic, plain, random_state, same, write
from kit.sim_device import SimDevice
from spillway.ops.device.backend import DeviceError
from spillway.ops.files.disk_map import DiskMap, SourceError
from spillway.ops.files.source import StateDict
from spillway.patcher.dynamic_model import DynamicModel, models
from spillway.patcher.policy import Policy

DEVICES = {"cpu": lambda: None, "device": SimDevice}


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "m.safetensors", Blocks(), torch.bfloat16)
    return tmp_path / "m.safetensors"


@pytest.fixture
def expected(path):
    return run(plain(Blocks, DiskMap(path).state_dict(), torch.float32))


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


def run(model):
    return model(getattr(model, "module", model).input())


# Made


def test_making_a_model_maps_and_moves_nothing(path, device):
    model = dynamic(Blocks, path, device=device)
    assert model.vbar_kind == "none"
    assert model.resident_bytes == model.pinned_bytes == model.peak_resident_bytes == 0
    assert not any(vars(model.ledger.counters).values())
    assert [resident for _, _, resident in model.bundle_report()] == [False] * len(model.bundles)
    assert device is None or device.copies == device.held() == 0


def test_the_first_forward_prepares(path, device, expected):
    model = dynamic(Blocks, path, device=device)
    assert same(run(model), expected)
    assert model.vbar_kind == "software"
    assert model.resident_bytes == model.total_bytes
    assert model.ledger.decisions


def test_only_models_that_are_alive_are_listed(path):
    model = dynamic(Blocks, path)
    assert model in models
    model.close()
    assert model not in models


def test_a_missing_key_is_an_error_with_file_key_and_advice(tmp_path):
    state = random_state(Blocks(), torch.float32)
    del state["blocks.1.1.weight"], state["scale"]
    save_file(state, tmp_path / "m.safetensors")
    message = re.escape(str(tmp_path / "m.safetensors")) + r": 2 tensors that Blocks needs are missing, such as scale, "
    with pytest.raises(
        SourceError, match=message + r"blocks\.1\.1\.weight\. The file is incomplete or of another arch"
    ):
        dynamic(Blocks, tmp_path / "m.safetensors")


def test_a_wrong_shape_is_an_error_with_file_key_and_both_shapes(tmp_path):
    state = random_state(Blocks(), torch.float32)
    state["scale"] = torch.zeros(7)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(SourceError, match=r"m\.safetensors: tensor 'scale' has shape \(7,\), Blocks expects \(96,\)"):
        dynamic(Blocks, tmp_path / "m.safetensors")


def test_a_buffer_of_wrong_shape_is_an_error(tmp_path):
    state = {**torch.nn.BatchNorm1d(4).state_dict(), "running_var": torch.ones(5)}
    with pytest.raises(SourceError, match=r"'running_var' has shape \(5,\), the buffer of BatchNorm1d has \(4,\)"):
        dynamic(lambda: torch.nn.BatchNorm1d(4), StateDict(state, "a.safetensors"))


def test_a_key_that_a_state_dict_lacks_is_an_error():
    with pytest.raises(SourceError, match="the state dict: no tensor 'x'"):
        StateDict({}).tensor("x")


@pytest.mark.parametrize("device", ["gpu", "cuda:1000", "mps:7", "meta"])
def test_an_unknown_device_is_an_error_that_lists_the_devices_there_are(device):
    with pytest.raises(DeviceError, match=rf"device '{device}'.*cpu"):
        DynamicModel(torch.nn.Linear(2, 2), None, device)


def test_a_vbar_that_cannot_be_had_is_an_error_that_says_why(path, expected):
    model = dynamic(Blocks, path, vbar="aimdo")
    with pytest.raises(RuntimeError, match=r"asks for comfy-aimdo's VBAR, but .*not cpu.*Choose 'auto' or 'software'"):
        run(model)
    model.set_policy(Policy(vbar="software"))
    assert same(run(model), expected)


def test_a_policy_that_cannot_be_had_leaves_a_running_model_as_it_was(path, expected):
    model = dynamic(Blocks, path)
    run(model)
    before = model.policy, model.resident_bytes
    with pytest.raises(RuntimeError, match="Choose 'auto' or 'software'"):
        model.set_policy(Policy(vbar="aimdo"))
    assert (model.policy, model.resident_bytes) == before
    assert same(run(model), expected)


# Released and closed


def test_a_released_model_holds_nothing_and_begins_anew(path, device, expected):
    model = dynamic(Blocks, path, device=device, vram_bytes=700_000)
    for _ in range(3):
        assert same(run(model), expected)
        run(model)
        model.release()
        assert model.vbar_kind == "none"
        assert model.resident_bytes == model.pinned_bytes == 0
        assert device is None or device.held() == 0
    assert model.peak_resident_bytes > 0


def test_a_closed_models_module_is_a_plain_one(path, device, expected):
    model = dynamic(Blocks, path, device=device)
    run(model)
    module = model.module
    model.close()
    assert {type(m) for m in module.modules()} == {type(m) for m in Blocks().modules()}
    assert not any(name.startswith("spillway") for m in module.modules() for name in vars(m))
    state = DiskMap(path).state_dict()
    assert all(same(tensor, state[key]) for key, tensor in module.state_dict().items())
    assert same(run(module.float()), expected)


def test_a_module_may_become_dynamic_again(path, device, expected):
    model = dynamic(Blocks, path, device=device)
    for _ in range(2):
        assert same(run(model), expected)
        model.close()
        model = DynamicModel(model.module, None, backend=device, model_dtype=lambda *_: torch.float32)


def test_releasing_and_closing_twice_is_harmless(path):
    model = dynamic(Blocks, path)
    model.release()
    run(model)
    for end in (model.release, model.release, model.close, model.close):
        end()


def test_a_module_whose_dynamic_model_was_dropped_says_so(path):
    module = dynamic(Blocks, path).module
    with pytest.raises(RuntimeError, match=r"dynamic model of '.*' was dropped while its module is still in use"):
        run(module)


def test_free_after_use_holds_nothing_between_runs(path, device, expected):
    model = dynamic(Blocks, path, device=device, keep="free after use")
    for _ in range(3):
        assert same(run(model), expected)
        assert model.resident_bytes == model.pinned_bytes == 0
        assert model.vbar_kind == "none"
    assert model.peak_resident_bytes > 0


def test_free_after_use_frees_after_a_failed_run_too(path):
    model = dynamic(Blocks, path, keep="free after use")
    with pytest.raises(IndexError):
        model(torch.tensor([[999]]))
    assert model.vbar_kind == "none"


# Run


def test_the_module_may_be_called_without_the_model(path, device, expected):
    model = dynamic(Blocks, path, device=device, vram_bytes=700_000)
    for _ in range(3):
        assert same(run(model.module), expected)


def test_part_of_the_module_may_be_called_alone(path, device):
    reference = plain(Blocks, DiskMap(path).state_dict(), torch.float32)
    model = dynamic(Blocks, path, device=device, vram_bytes=700_000)
    x = torch.ones(2, 96)
    for _ in range(2):
        assert same(model.module.blocks[2](x), reference.blocks[2](x))
        assert same(run(model), run(reference))


def test_borrowing_by_hand_gives_the_tensors_and_takes_them_back(path, device):
    model = dynamic(Blocks, path, device=device)
    run(model)
    bundle = model.by_key["conv.weight"]
    state = DiskMap(path).state_dict()
    with model.caster.borrow(bundle) as (weight, bias):
        assert same(weight, state["conv.weight"].float())
        assert same(bias, state["conv.bias"].float())
    assert model.free() == model.total_bytes


def test_steps_are_counted(path):
    model = dynamic(Blocks, path)
    for _ in range(3):
        run(model)
    assert model.ledger.counters.steps == 3


def test_the_ledger_is_plain_data_with_sizes_in_words(path):
    model = dynamic(Blocks, path, vram_bytes=300_000)
    run(model)
    record = model.ledger.as_dict()
    assert record["name"] == "Blocks"
    assert record["counters"]["faults"] > 0
    assert any(
        re.search(r"offloaded \d+ of \d+ bundles \(\d+\.\d KiB\): budget 293\.0 KiB", d) for d in record["decisions"]
    )


def test_the_model_dtype_may_be_chosen_per_parameter(path, device):
    def choose(module, attr, parameter):
        return torch.float16 if isinstance(module, AnyLinear) and attr == "weight" else torch.float32

    state = random_state(Stack(3, 64), torch.bfloat16)
    model = DynamicModel(Stack(3, 64), StateDict(state), backend=device, model_dtype=choose)
    reference = plain(lambda: Stack(3, 64), state, torch.float32)
    for layer in reference.layers:
        layer.weight.data = layer.weight.half()
    for _ in range(2):
        assert same(run(model), run(reference))
    assert {param.final.dtype for bundle in model.bundles for param in bundle.params} == {torch.float16, torch.float32}


def test_buffers_come_from_the_file_in_the_modules_dtype():
    state = {"weight": torch.ones(4), "bias": torch.zeros(4), "running_mean": torch.arange(4).half()}
    state |= {"running_var": torch.ones(4), "num_batches_tracked": torch.tensor(5)}
    model = dynamic(lambda: torch.nn.BatchNorm1d(4), StateDict(state))
    assert same(model.module.running_mean, torch.arange(4).float())
    assert model.module.num_batches_tracked == 5
    state["running_mean"].zero_()
    assert model.module.running_mean.tolist() == [0, 1, 2, 3]
