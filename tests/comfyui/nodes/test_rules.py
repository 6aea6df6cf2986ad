"""Rules, percentages, profiles and what holds for a whole graph: as the nodes say it, and as models obey."""

import comfy.model_management as mm
import comfy.utils
import execution
import folder_paths
import pytest
import torch

from kit.comfyui.pairs import SMALL, assert_same, run
from spillway.nodes.extension import graph_policy, read
from spillway.nodes.policy import GIB, PROFILES, SpillwayPolicy
from spillway.nodes.rules import SpillwayPlacementRules
from spillway.ops.vbar.cap import cap_of
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.policy import Policy, Rule

AUTO = {"vram_gb": -1.0, "headroom_gb": -1.0, "pinned_gb": -1.0, "keep": "auto", "priority": 0}
PLAIN = {
    "pattern": "*",
    "offload": "auto",
    "storage_dtype": "as it is",
    "compute_dtype": "as it is",
    "resident": True,
    "prefetch": -1,
    "streams": -1,
    "vbar": "as it is",
}


@pytest.fixture(autouse=True)
def nothing_is_said_afterwards():
    yield
    graph_policy.begin(None, [])


def ruled(**changes):
    return SpillwayPlacementRules.execute(**{**PLAIN, **changes}).args[0]


def said(**changes):
    return SpillwayPolicy.execute(**{**AUTO, **changes}).args[1]


@pytest.fixture
def model(checkpoint):
    return load_diffusion_model(checkpoint("flux", **SMALL, dtype=torch.float32))


def test_rules_chain_and_a_policy_keeps_them():
    first = ruled(pattern=" *.img_attn.* ", offload="pin", storage_dtype="fp16", compute_dtype="fp32", resident=False)
    second = ruled(policy=first, offload="ram", prefetch=3, streams=1, vbar="software")
    assert second.rules == (
        Rule("*.img_attn.*", "pin", torch.float16, torch.float32, resident=False),
        Rule("*", "ram"),
    )
    assert (second.prefetch, second.streams, second.vbar) == (3, 1, "software")
    assert ruled(policy=second, pattern="").rules == second.rules and ruled(policy=second, pattern="").streams == 1
    policy = said(policy=second, vram_gb=1.0, priority=2)
    assert policy == second.with_changes(vram_bytes=GIB, priority=2)
    assert said() == Policy() == ruled(pattern="")


def test_a_model_obeys_its_rules(model, checkpoint, tmp_path):
    """A weight that is stored in another format gives the latents of a file with the numbers that it leaves."""
    wanted = run(model)
    tensors = comfy.utils.load_torch_file(checkpoint("flux", **SMALL, dtype=torch.float32))
    rounded = {name: tensor.half().float() if ".linear1." in name else tensor for name, tensor in tensors.items()}
    assert sum(not torch.equal(tensor, tensors[name]) for name, tensor in rounded.items()) == 2  # weight and bias
    comfy.utils.save_torch_file(rounded, str(tmp_path / "rounded.safetensors"))
    of_rounded = run(load_diffusion_model(str(tmp_path / "rounded.safetensors")))
    blocks = "diffusion_model.double_blocks.*"
    policy = ruled(policy=ruled(pattern=blocks, resident=False), pattern="*.linear1", storage_dtype="fp16")
    _, changed = SpillwayPlacementRules.execute(**{**PLAIN, "pattern": ""}, policy=policy, model=model).args
    assert_same(run(changed), of_rounded)
    dynamic = changed.dynamic
    for bundle in dynamic.bundles:
        inside = bundle.name.startswith("diffusion_model.double_blocks.")
        assert dynamic.residency.is_resident(bundle) == (not inside and not bundle.by_rows), bundle.name
        if bundle.name.endswith("linear1"):
            assert bundle.params[0].final.dtype == torch.float16
    assert not torch.equal(of_rounded, wanted)
    assert_same(run(model), wanted)  # the model that came in has none


def test_percentages_are_of_the_device_and_of_the_ram(model):
    policy = said(unit="percent", vram_gb=25.0, headroom_gb=10.0, pinned_gb=50.0)
    assert (policy.vram_share, policy.headroom_share, policy.pinned_share) == (0.25, 0.1, 0.5)
    assert policy.in_bytes(1000, 3000) == Policy(vram_bytes=250, headroom_bytes=100, pinned_bytes=1500)
    model.set_policy(policy)
    run(model)
    _, total = model.dynamic.backend.memory()
    assert model.dynamic.policy.vram_bytes == int(0.25 * total)
    before = model.dynamic.residency
    run(model)
    assert model.dynamic.residency is before  # the policy is the same, so nothing is made anew
    with pytest.raises(ValueError, match="vram_gb is 101 percent; give 0 to 100"):
        said(unit="percent", vram_gb=101.0)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_fills_in_what_is_not_given(profile):
    card, ram = PROFILES[profile]
    policy, cap = SpillwayPolicy.made(**AUTO, profile=profile)
    assert 0 <= card * GIB - policy.headroom_bytes - policy.vram_bytes <= 1 and cap == policy.vram_bytes
    assert policy.pinned_bytes == ram * GIB // 4
    own, cap = SpillwayPolicy.made(**{**AUTO, "vram_gb": 2.0}, profile=profile, all_models_gb=1.0)
    assert own.vram_bytes == 2 * GIB and cap == GIB and own.headroom_bytes == policy.headroom_bytes


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_a_prompt_is_read_before_it_runs():
    """Values of cached nodes count. What another node gives is known when that has run."""
    prompt = {
        "1": node("SpillwayPlacementRules", **{**PLAIN, "pattern": "*.a"}),
        "2": node("SpillwayPlacementRules", **PLAIN, policy=["1", 0]),
        "3": node("SpillwayPolicy", **{**AUTO, "vram_gb": 1.0}, whole_graph=True, policy=["2", 0]),
        "4": node("SpillwayPolicy", **AUTO, all_models_gb=3.0),
        "5": node("SpillwayPolicy", **AUTO, profile="8 GB card, 16 GB RAM", model=["9", 0]),
        "6": node("SpillwayPolicy", **{**AUTO, "vram_gb": ["9", 0]}, whole_graph=True),
        "7": node("SpillwayPolicy", **{**AUTO, "vram_gb": "much"}, whole_graph=True),
        "8": node("SpillwayPolicy", **{**AUTO, "priority": 7}),
        "9": node("PrimitiveFloat", value=1.0),
    }
    policy, caps = read(prompt)
    assert policy == Policy(vram_bytes=GIB, rules=(Rule("*.a"), Rule("*")))
    assert caps == [3 * GIB, int(7.5 * GIB)]
    assert read({"9": prompt["9"], "8": prompt["8"]}) == (None, [])


JUNK = ["much", "3", float("nan"), float("inf"), -200, 1e300, 10**400, [], {}, ["1", 0, 0], [[], 0], "\ud800"]
RULED = {"class_type": "SpillwayPlacementRules", "inputs": PLAIN}
# Inputs that no output needs, which ComfyUI does not check.
SENSELESS = [
    *({**AUTO, "all_models_gb": 1.0, "whole_graph": True, name: junk} for name in AUTO for junk in JUNK),
    *({**AUTO, "whole_graph": True, name: junk} for name in ("all_models_gb", "profile", "unit") for junk in JUNK),
    *({**AUTO, "whole_graph": True, "policy": junk} for junk in JUNK),
    {**AUTO, "whole_graph": True, "unit": "percent", "all_models_gb": 101.0},
    {**AUTO, "whole_graph": True, "policy": ["1", 0]},  # its own
    {**AUTO, "whole_graph": True, "policy": ["3", 0]},
    {"all_models_gb": 1.0},
    {**AUTO, "all_models_gb": 1.0, "another": 1},
    None,
    [],
]


def test_what_makes_no_sense_in_a_prompt_is_named_and_has_no_effect(model, monkeypatch, caplog):
    """The setting and the other nodes hold, and nothing of the prompt before."""
    monkeypatch.setenv("SPILLWAY_MODELS_GB", "3")
    other = node("SpillwayPolicy", **AUTO, all_models_gb=2.0)
    ring = node("SpillwayPlacementRules", **PLAIN, policy=["1", 0])
    for inputs in SENSELESS:
        caplog.clear()
        begun = {"1": {"class_type": "SpillwayPolicy", "inputs": inputs}, "2": RULED, "3": ring, "4": other}
        assert read(begun) == (None, [3 * GIB, 2 * GIB]), inputs
        (words,) = (record.getMessage() for record in caplog.records)
        assert words.startswith("[Spillway] node 1 says nothing for the whole graph before it runs: ")
        assert len(words.encode()) < 1000, inputs


@pytest.mark.parametrize("text", ["-1", "nan", "8GB", "1e-12"])
def test_a_cap_of_the_environment_that_makes_no_sense_is_ignored(text, model, monkeypatch):
    """One that is smaller than every layer is a cap as any other."""
    wanted = run(model)
    monkeypatch.setenv("SPILLWAY_MODELS_GB", text)
    graph_policy.begin(*read({}))
    assert cap_of(mm.get_torch_device()) == (0 if text == "1e-12" else None)
    assert_same(run(model), wanted)
    assert (model.dynamic.resident_bytes == 0) == (text == "1e-12")


def test_the_executor_begins_each_prompt_with_what_it_says(model, tmp_path, monkeypatch):
    """On all devices. The setting holds for all prompts, and the variable goes before it."""
    devices = mm.get_torch_device(), torch.device("cuda", 7)
    monkeypatch.setattr(mm, "get_all_torch_devices", lambda: list(devices), raising=False)
    graph_policy.install(read)
    begun = execution.PromptExecutor.execute
    graph_policy.install(read)
    assert execution.PromptExecutor.execute is begun  # once is enough
    seen = []

    class Executor(execution.PromptExecutor):
        def __init__(self):
            pass

        async def execute_async(self, prompt, *_, **__):
            cap, other = map(cap_of, devices)
            assert cap == other
            seen.append((model.policy, cap))

    settings = tmp_path / "default" / "comfy.settings.json"
    settings.parent.mkdir()
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    prompt = {"1": node("SpillwayPolicy", **{**AUTO, "vram_gb": 1.0}, whole_graph=True, all_models_gb=2.0)}
    Executor().execute(prompt, "id")
    settings.write_text('{"Spillway.Models.DeviceGB": 1.5}')
    for given in ({}, {"1": {"class_type": "SpillwayPolicy", "inputs": {"whole_graph": True}}}, prompt):
        Executor().execute(given, "id")
    monkeypatch.setenv("SPILLWAY_MODELS_GB", "1")
    Executor().execute(prompt, "id")
    monkeypatch.setenv("SPILLWAY_MODELS_GB", "0")
    Executor().execute({}, "id")
    settings.write_text('{"Spillway.Models.DeviceGB": 0}')
    monkeypatch.delenv("SPILLWAY_MODELS_GB")
    Executor().execute({}, "id")
    own, half_more = Policy(vram_bytes=GIB), GIB * 3 // 2
    assert seen == [
        (own, 2 * GIB),
        (Policy(), half_more),
        (Policy(), half_more),
        (own, half_more),
        (own, GIB),
        (Policy(), None),
        (Policy(), None),
    ]


def test_a_policy_for_the_whole_graph_holds_for_models_without_one_of_their_own(model, checkpoint):
    own = load_diffusion_model(checkpoint("flux", **SMALL, dtype=torch.float32, seed=1), policy=Policy(priority=1))
    SpillwayPolicy.execute(**{**AUTO, "vram_gb": 0.0}, whole_graph=True)
    for one in (model, own):
        run(one)
    assert model.dynamic.peak_resident_bytes == 0 < own.dynamic.resident_bytes
    assert model.clone().policy.vram_bytes == 0
    graph_policy.begin(None, [])
    run(model)
    assert model.dynamic.resident_bytes > 0 and model.policy == Policy()


def test_all_models_of_a_graph_share_a_cap(model, checkpoint):
    others = [load_diffusion_model(checkpoint("flux", **SMALL, dtype=torch.float32, seed=n)) for n in (1, 2)]
    wanted = [run(one) for one in (model, *others)]
    cap = int(1.5 * model.model_size())
    SpillwayPolicy.execute(**AUTO, all_models_gb=cap / GIB)
    for _ in range(2):
        for one, latent in zip((model, *others), wanted, strict=True):
            assert_same(run(one), latent)
            assert sum(m.dynamic.resident_bytes for m in (model, *others) if m.dynamic.residency) <= cap
