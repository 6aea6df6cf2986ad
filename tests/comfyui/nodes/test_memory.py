"""Nodes that move models by hand, report memory, set the cache's policy and free memory before a VAE tiles."""

import asyncio
import json

import comfy.model_management
import comfy.sd
import execution
import nodes as comfyui_nodes
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.dynamic_vram import in_pieces
from kit.comfyui.pairs import assert_alike, run
from spillway.cache.comfyui import install as cache_install
from spillway.cache.comfyui.models import model_bytes
from spillway.nodes.load import SpillwayLoadCheckpoint
from spillway.nodes.memory import DROP, LOAD, MOVE, UNLOAD, SpillwayDeviceControl, SpillwayMemoryReport
from spillway.nodes.policy import SpillwayCachePolicy
from spillway.nodes.vae import SpillwayVAEDecode, SpillwayVAEEncode
from spillway.patcher.comfyui import device as comfy_device
from spillway.patcher.comfyui import vae as comfy_vae
from spillway.patcher.comfyui.loading.load import is_ours, load_diffusion_model

MIB = 1 << 20
HERE = comfy.model_management.get_torch_device()
IN_PLACE = HERE.type == "cpu"


@pytest.fixture(params=["cpu:1"] if IN_PLACE else [f"{HERE.type}:1", "cpu"])
def there(request, monkeypatch):
    """Another device. ComfyUI takes `cpu:1` for another than `cpu`, and its tensors lie where those of `cpu` do."""
    names = comfy_device.device_names()
    if IN_PLACE:
        monkeypatch.setattr(comfy_device, "device_names", lambda: [*names, request.param])
    elif request.param not in names:
        pytest.skip(f"this machine has no {request.param} to move to")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def names(checkpoint):
    return checkpoint("sd15", mult=(1,)).rsplit("/", 1)[-1]


def ours(names):
    return SpillwayLoadCheckpoint.execute(names).result


def load_classic(names):
    return comfyui_nodes.CheckpointLoaderSimple().load_checkpoint(names)


# --- device control ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [LOAD, UNLOAD, DROP])
def test_every_action_works_on_models_that_were_never_loaded_and_twice(names, action):
    for load in (ours, load_classic):
        model, clip, vae = load(names)[:3]
        for _ in range(2):
            out = SpillwayDeviceControl.execute(action, "as it is", model, clip, vae, after="x").result
            assert out[:4] == (model, clip, vae, "x")
            assert out[4].count("\n") == 2 and out[4].count(" -> ") == 12


def test_a_dynamic_model_loads_unloads_and_gives_the_same_result(names):
    model = ours(names)[0]
    wanted = sampling.sample(model, steps=2)
    dynamic = model.dynamic
    SpillwayDeviceControl.execute(UNLOAD, "as it is", model)
    assert dynamic.resident_bytes == 0
    report = SpillwayDeviceControl.execute(LOAD, "as it is", model).result[4]
    assert dynamic.resident_bytes == in_pieces(dynamic.total_bytes) and "load now" in report
    assert torch.equal(sampling.sample(model, steps=2), wanted)
    SpillwayDeviceControl.execute(DROP, "as it is", model)
    assert dynamic.resident_bytes == dynamic.pinned_bytes == 0 and dynamic.caster is None
    assert torch.equal(sampling.sample(model, steps=2), wanted)


def test_memory_of_weights_in_another_form_counts(names):
    """On a CPU, weights that are used where they lie in their file take none; what is cast from them does.

    A device of its own holds all that it computes with, and RAM nothing more.
    """
    vae = ours(names)[2]
    before = model_bytes(vae.patcher)
    for _ in range(2):  # on a CPU the first use of what is cast takes none that stays
        vae.decode(torch.randn(1, 4, 8, 8))
    dynamic = vae.patcher.dynamic
    held = sum(bundle.nbytes for bundle in dynamic.bundles if not bundle.in_place)
    place, other = ("ram", "vram") if IN_PLACE else ("vram", "ram")
    after = model_bytes(vae.patcher)
    assert 0 < after[place] - before[place] <= in_pieces(held) + dynamic.placed_bytes + dynamic.buffer_bytes
    assert after[other] == before[other]
    SpillwayDeviceControl.execute(UNLOAD, "as it is", vae=vae)
    assert {**model_bytes(vae.patcher), "pins": 0} == {**before, "pins": 0}


def test_loading_by_hand_leaves_the_traced_order(names):
    model = ours(names)[0]
    sampling.sample(model, steps=3)
    order = model.dynamic.execution_order()
    SpillwayDeviceControl.execute(UNLOAD, "as it is", model)
    SpillwayDeviceControl.execute(LOAD, "as it is", model)
    assert model.dynamic.execution_order() == order


def test_a_classic_model_leaves_its_device_and_says_that_its_ram_stays(names):
    model, _, vae = load_classic(names)
    SpillwayDeviceControl.execute(LOAD, "as it is", model, vae=vae)
    assert {id(loaded.model.model) for loaded in comfy.model_management.current_loaded_models} >= {id(model.model)}
    report = SpillwayDeviceControl.execute(DROP, "as it is", model).result[4]
    loaded = [loaded.model.model for loaded in comfy.model_management.current_loaded_models]
    assert not any(one is model.model for one in loaded) and any(one is vae.patcher.model for one in loaded)
    assert "its RAM stays" in report
    assert model_bytes(model)["ram"] > MIB


def test_devices_that_are_absent_or_ignored_are_errors(names, monkeypatch):
    model, clip, vae = ours(names)[:3]
    with pytest.raises(ValueError, match=r"there is no device 'cuda:7' here\. There are: cpu"):
        SpillwayDeviceControl.execute(MOVE, "cuda:7", model)
    with pytest.raises(ValueError, match="choose the device"):
        SpillwayDeviceControl.execute(MOVE, "as it is", model)
    with pytest.raises(ValueError, match="connect 'model', 'clip' or 'vae'"):
        SpillwayDeviceControl.execute(UNLOAD, "as it is")
    out = SpillwayDeviceControl.execute(MOVE, str(HERE), model, clip, vae).result
    assert out[0] is model and out[2].device == HERE

    classic = load_classic(names)[0]
    classic.load_device = torch.device("meta")  # as if it were another device
    monkeypatch.setattr(classic, "is_dynamic", lambda: True)
    with pytest.raises(ValueError, match="would go on using meta"):
        comfy_device.moved(classic, str(HERE))


def test_a_moved_model_runs_where_it_was_moved(names):
    """From a device that is none."""
    for load in (ours, load_classic):
        model = load(names)[0]
        elsewhere = model.clone()
        elsewhere.load_device = torch.device("meta")
        if hasattr(elsewhere, "register_load_device"):
            elsewhere.register_load_device(elsewhere.load_device)
        made = SpillwayDeviceControl.execute(MOVE, str(HERE), elsewhere).result[0]
        assert made is not elsewhere and made.load_device == HERE
        assert torch.equal(sampling.sample(made, steps=1), sampling.sample(model, steps=1))


@pytest.mark.parametrize("load", [load_diffusion_model, comfy.sd.load_diffusion_model], ids=["ours", "classic"])
def test_a_model_moves_between_two_devices_and_back(load, flux, there):
    """All compute, whichever ran before: the model that came in too, where it was."""
    model = load(flux)
    if not is_ours(model) and model.is_dynamic():
        pytest.skip("with dynamic VRAM on, ComfyUI's own models are not moved: they are refused")
    wanted = run(model)
    moved = SpillwayDeviceControl.execute(MOVE, str(there), model).result[0]
    assert moved.load_device == there and model.load_device == HERE
    assert_alike(run(moved), wanted, there)
    if is_ours(model):
        assert moved.dynamic.device == there
    loaded = {
        entry.device for entry in comfy.model_management.current_loaded_models if entry.model.model is moved.model
    }
    assert loaded == {there}, "it is loaded there, and no longer where it was"
    back = SpillwayDeviceControl.execute(MOVE, str(HERE), moved).result[0]
    assert back.load_device == HERE
    for one in (back, moved, model, moved, back):
        assert_alike(run(one), wanted, one.load_device)


def test_a_text_encoder_and_a_vae_move_and_the_originals_stay(names, there):
    _, clip, vae = ours(names)[:3]
    latent = sampling.latent(4, 32, 32)
    wanted = [*sampling.text_encode(clip, "a fox"), sampling.vae_decode(vae, latent)]
    out = SpillwayDeviceControl.execute(MOVE, str(there), clip=clip, vae=vae).result
    assert out[1].patcher.load_device == out[2].patcher.load_device == there
    for encoder, decoder in (out[1:3], (clip, vae)):
        got = [*sampling.text_encode(encoder, "a fox"), sampling.vae_decode(decoder, latent)]
        assert_alike(got, wanted, encoder.patcher.load_device)


# --- report -----------------------------------------------------------------------------------------------------------


def test_the_memory_report_names_models_memory_and_cache(names):
    model = ours(names)[0]
    classic = load_classic(names)[0]
    sampling.sample(model, steps=2)
    comfy.model_management.load_models_gpu([classic])
    value, text, picture = SpillwayMemoryReport.execute("anything").result
    assert value == "anything"
    device = comfy.model_management.get_torch_device()
    assert f"(Spillway, {device})" in text and f"(ComfyUI, {device})" in text and "Memory: process" in text
    assert "may stay resident" in text, "the last decisions"
    assert picture.shape[0] == 1 and picture.shape[2:] == (1024, 3)
    assert 0 <= picture.min() and picture.max() <= 1
    bright = picture[0, 12 + 18 + 5]
    assert (bright[:, 1] > 0.7).float().mean() > 0.7, "all layers are resident"
    SpillwayDeviceControl.execute(UNLOAD, "as it is", model)
    bright = SpillwayMemoryReport.execute("x").result[2][0, 12 + 18 + 5]
    assert (bright[:, 1] > 0.7).float().mean() < 0.1


def test_the_report_is_plain_data(names):
    from spillway.nodes.memory_report import memory_report

    model = ours(names)[0]
    sampling.sample(model, steps=1)
    report = json.loads(json.dumps(memory_report()))
    (record,) = [
        one for one in report["models"] if one["by"] == "Spillway" and one["name"] == type(model.model).__name__
    ]
    assert record["bytes"]["disk"] > 0 and record["total"] == model.dynamic.total_bytes
    assert sum(size for _, size, _ in record["residency"]) == record["total"]
    assert report["memory"]["rss"] > 100 * MIB


# --- cache policy -----------------------------------------------------------------------------------------------------


class Server:
    client_id = None
    last_node_id = None

    def send_sync(self, *_):
        pass


@pytest.fixture
def cache(monkeypatch):
    for name in ("init_ram_cache", "init_classic_cache"):
        monkeypatch.setattr(execution.CacheSet, name, getattr(execution.CacheSet, name))
    assert cache_install.install()
    cache_args = {"lru": 0, "ram": 2.0, "ram_inactive": 64.0}
    executor = execution.PromptExecutor(Server(), execution.CacheType.RAM_PRESSURE, cache_args)
    yield executor
    monkeypatch.setattr(cache_install, "_current", None)


def test_the_cache_policy_node_sets_headroom_and_drops_entries(cache, monkeypatch):
    monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, "SpillwayCachePolicy", SpillwayCachePolicy)
    SpillwayCachePolicy.GET_SCHEMA()

    def run(**policy):
        prompt = {
            "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 64}},
            "policy": {"class_type": "SpillwayCachePolicy", "inputs": {"value": ["empty", 0], **policy}},
        }
        asyncio.run(cache.execute_async(prompt, "1", {}, ["policy"]))
        assert cache.success, cache.status_messages

    engine = cache.caches.outputs.engine
    before = engine.headroom
    run(headroom_gb=3.0, never_evict=True)
    assert engine.headroom == 3 << 30
    assert engine.evict(1 << 60).entries == 0, "the latent, and what passed it on"
    run(headroom_gb=3.0, never_evict=True)
    assert engine.headroom == 3 << 30, "also where its output is cached"
    run(headroom_gb=-1.0, never_evict=False)
    assert engine.headroom == before
    assert engine.evict(1 << 60).entries == 3 and not engine.entries


def test_a_bad_headroom_is_an_error_and_comfyuis_own_cache_is_left_alone(monkeypatch, caplog):
    with pytest.raises(ValueError, match=r"headroom_gb is -0.5; give 0 or more GB"):
        SpillwayCachePolicy.execute("x", -0.5, False)
    with pytest.raises(ValueError, match=r"'disk_gb' is nan \(float\); expected a number from -1 to 1024"):
        SpillwayCachePolicy.execute("x", -1.0, False, float("nan"))
    monkeypatch.setattr(cache_install, "_current", None)
    assert SpillwayCachePolicy.execute("x", 2.0, True).result == ("x",)
    assert "no effect" in caplog.text


# --- VAE --------------------------------------------------------------------------------------------------------------


class Full:
    """A VAE's model that runs out of memory as often as told. A device that really would does not exist here."""

    def __init__(self, vae, name, times):
        self.model, self.name, self.times, self.calls = vae.first_stage_model, name, times, 0
        self.real = getattr(self.model, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls <= self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("load", [ours, load_classic])
@pytest.mark.parametrize(("times", "how"), [(0, "plain"), (1, "plain, after everything else"), (2, "tiled, 64 pixels")])
def test_a_vae_out_of_memory_falls_back_as_far_as_it_must(names, monkeypatch, load, times, how):
    vae, model = load(names)[2], load(names)[0]
    latent = torch.randn(1, 4, 8, 8)
    wanted = vae.decode(latent)
    comfy.model_management.load_models_gpu([model])
    monkeypatch.setattr(vae.first_stage_model, "decode", Full(vae, "decode", times))
    images, said = SpillwayVAEDecode.execute({"samples": latent}, vae, 64).result
    assert said.startswith(how) and images.shape == wanted.shape
    if times < 2:
        assert torch.equal(images, wanted)
    if times:
        loaded = [one.model.model for one in comfy.model_management.current_loaded_models]
        assert not any(one is model.model for one in loaded), "it was freed for the VAE"

    pixels = torch.rand(1, 64, 64, 3)
    wanted = vae.encode(pixels)
    monkeypatch.setattr(vae.first_stage_model, "encode", Full(vae, "encode", times))
    made, said = SpillwayVAEEncode.execute(pixels, vae, 64).result
    assert said.startswith(how) and made["samples"].shape == wanted.shape
    if times < 2:
        assert torch.equal(made["samples"], wanted)


def test_other_errors_are_the_vaes_own(names):
    vae = ours(names)[2]
    with pytest.raises(RuntimeError, match=r"channels|size"):
        SpillwayVAEDecode.execute({"samples": torch.randn(1, 9, 8, 8)}, vae, 512)


def test_comfyuis_tiling_is_refused_where_plain_is_asked_for(names):
    """If ComfyUI changes how it falls back, plain would no longer mean plain."""
    vae = ours(names)[2]
    refusing = comfy_vae._without_tiling(vae)
    for name in ("decode_tiled_", "encode_tiled_"):
        with pytest.raises(comfy_vae._OutOfRoom):
            getattr(refusing, name)(None)
