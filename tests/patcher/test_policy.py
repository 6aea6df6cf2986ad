"""The policy: what it accepts, and what its rules do to the modules they name."""

import time

import pytest
import torch

from kit.nets import Stack, dynamic, plain, same, write
from kit.sim_device import SimDevice
from spillway.patcher.policy import Policy, Rule

DEPTH = 6
ALL = 1 << 40
DEVICES = {"cpu": lambda: None, "device": SimDevice}


def build():
    return Stack(DEPTH)


@pytest.fixture(params=DEVICES.values(), ids=DEVICES)
def device(request):
    return request.param()


def made(tmp_path, device, *rules, file_dtype=torch.float32, dtype=torch.float32, **policy):
    state = write(tmp_path / "m.safetensors", build(), file_dtype)
    return dynamic(build, tmp_path / "m.safetensors", dtype, device=device, rules=rules, **policy), state


def run(model):
    return model(model.module.input())


def run_plain(state):
    module = plain(build, state, torch.float32)
    return module(module.input())


@pytest.mark.parametrize("name", ["vram_bytes", "headroom_bytes", "pinned_bytes", "prefetch", "streams"])
@pytest.mark.parametrize("value", [-1, 1.5, "1 GiB"])
def test_a_size_that_is_no_size_is_refused_with_its_name(name, value):
    with pytest.raises(ValueError, match=rf"policy: {name} is {value!r}; expected a whole number of at least 0"):
        Policy(**{name: value})


@pytest.mark.parametrize("name", ["vram_bytes", "headroom_bytes", "pinned_bytes"])
def test_a_size_may_be_zero_or_left_to_the_pack(name):
    assert getattr(Policy(**{name: 0}), name) == 0
    assert getattr(Policy(**{name: None}), name) is None


def test_the_number_of_streams_may_not_be_left_out():
    with pytest.raises(ValueError, match="policy: streams is None"):
        Policy(streams=None)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"keep": "forever"}, "keep is 'forever'; expected one of auto, always, free after use"),
        ({"vbar": "cuda"}, "vbar is 'cuda'; expected one of auto, aimdo, software"),
        ({"priority": "high"}, "priority is 'high'; expected a whole number"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_choices(field, message):
    with pytest.raises(ValueError, match=f"policy: {message}"):
        Policy(**field)


def test_an_unknown_place_in_a_rule_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="rule 'x': offload is 'nvme'; expected one of auto, disk, ram, pin"):
        Rule("x", offload="nvme")


@pytest.mark.parametrize("pattern", [None, 7, "x" * 1001, b"*"], ids=str)
def test_a_pattern_that_is_none_is_named_at_once(pattern):
    with pytest.raises(ValueError, match=r"rule .*: expected a pattern of names with at most 1000 characters"):
        Rule(pattern)


@pytest.mark.parametrize("pattern", ["[", "[z-a]", "*a" * 500, "[!]", "[]]", "(?i)x+", "?" * 1000, "**", "\\", "\n"])
def test_absurd_patterns_take_no_time_and_match_as_text(pattern):
    begun = time.perf_counter()
    assert Policy(rules=(Rule(pattern),)).may_reside("a" * 400)
    assert (Policy(rules=(Rule(pattern),)).rule_for("a" * 1000) is not None) == (
        pattern in ("**", "*a" * 500, "?" * 1000)
    )
    assert time.perf_counter() - begun < 1.0


def test_changes_are_checked_and_leave_the_original_alone():
    policy = Policy(vram_bytes=5)
    assert policy.with_changes(vram_bytes=6).vram_bytes == 6
    assert policy.vram_bytes == 5
    with pytest.raises(ValueError, match="vram_bytes is -6"):
        policy.with_changes(vram_bytes=-6)


def test_the_first_rule_that_matches_counts():
    first, second, other = Rule("blocks.1"), Rule("blocks.*"), Rule("Blocks.*")
    policy = Policy(rules=(other, first, second))
    assert policy.rule_for("blocks.1") is first
    assert policy.rule_for("blocks.10.attention") is second
    assert policy.rule_for("final") is None


def test_other_rules_need_another_model(tmp_path, device):
    model, _ = made(tmp_path, device)
    with pytest.raises(ValueError, match="rules of a policy are read when the model is made"):
        model.set_policy(Policy(rules=(Rule("*"),)))


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_storage_in_fp8_and_computation_in_bf16_equal_explicit_casts(tmp_path, device, budget, file_dtype):
    rule = Rule("layers.[135]", storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    model, state = made(tmp_path, device, rule, file_dtype=file_dtype, vram_bytes=budget)
    reference = plain(build, state, torch.float32)
    for index in (1, 3, 5):
        for parameter in reference.layers[index].parameters():
            parameter.data = parameter.to(torch.float8_e4m3fn).to(torch.bfloat16)
    for _ in range(3):
        assert same(run(model), reference(reference.input()))
    assert model.bundles[1].nbytes < model.bundles[0].nbytes / 3
    if budget is None:
        assert model.resident_bytes == model.total_bytes


def test_storage_in_fp8_alone_computes_in_the_dtype_of_the_model(tmp_path, device):
    model, state = made(tmp_path, device, Rule("*", storage_dtype=torch.float8_e5m2), dtype=torch.bfloat16)
    reference = plain(build, state, torch.bfloat16)
    for key, parameter in reference.named_parameters():
        parameter.data = state[key].to(torch.float8_e5m2).to(torch.bfloat16)
    for _ in range(2):
        assert same(run(model), reference(reference.input()))


def test_a_rule_that_streams_keeps_its_modules_off_the_device(tmp_path, device):
    model, state = made(tmp_path, device, Rule("layers.[02]", resident=False))
    expected = run_plain(state)
    for _ in range(3):
        assert same(run(model), expected)
    assert [name for name, _, resident in model.bundle_report() if not resident] == ["layers.0", "layers.2"]
    assert model.free(1) > 0


@pytest.mark.parametrize(("place", "is_pinned"), [("disk", False), ("ram", True), ("pin", True), ("auto", True)])
def test_a_rule_says_where_an_offloaded_weight_lies(tmp_path, place, is_pinned):
    device = SimDevice()
    model, state = made(tmp_path, device, Rule("layers.2", offload=place), vram_bytes=0, pinned_bytes=ALL)
    expected = run_plain(state)
    for _ in range(3):
        assert same(run(model), expected)
    assert model.pinned_bytes == model.total_bytes - (not is_pinned) * model.bundles[2].nbytes


def test_a_weight_kept_in_ram_takes_no_page_locked_memory(tmp_path):
    locked = {}
    for place in ("ram", "pin"):
        device = SimDevice()
        model, _ = made(tmp_path, device, Rule("*", offload=place), vram_bytes=0, pinned_bytes=ALL)
        run(model)
        locked[place] = device.pinned
    assert locked["ram"] == 0
    assert locked["pin"] == model.total_bytes
