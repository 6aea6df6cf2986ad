"""Models that somebody unloads by hand: ComfyUI's list keeps an entry without what it calls on every entry."""

import contextlib
import gc
import threading
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.sd
import execution
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.pairs import SMALL, assert_same, comfyui_vae, run
from spillway.nodes import routes
from spillway.nodes.memory import DROP, LOAD, UNLOAD, SpillwayDeviceControl
from spillway.nodes.vae import SpillwayVAEDecode
from spillway.patcher.comfyui import vae as comfy_vae
from spillway.patcher.comfyui.loading import load as comfy_load

LATENT = sampling.latent(16, 32, 32)


@pytest.fixture(autouse=True)
def tidy():
    """What a failing test leaves on ComfyUI's list would fail all that follow."""
    yield
    mm.current_loaded_models[:] = [entry for entry in mm.current_loaded_models if entry.real_model is not None]


@pytest.fixture(params=["ours", "classic"])
def models(request, checkpoint):
    """(patcher of a model, VAE)"""
    flux, vae = checkpoint("flux", **SMALL), checkpoint("flux_vae")
    if request.param == "ours":
        return comfy_load.load_diffusion_model(flux), comfy_load.load_vae(vae)
    return comfy.sd.load_diffusion_model(flux), comfyui_vae(vae)


def unload_by_hand(patcher):
    """Returns the entry; as other packs do it."""
    mm.load_models_gpu([patcher])
    (entry,) = (entry for entry in mm.current_loaded_models if entry.model is patcher)
    assert entry.model_unload()
    assert entry.model_finalizer is None and entry in mm.current_loaded_models
    return entry


class Server:
    client_id = None
    last_node_id = None

    def queue_updated(self, *_):
        pass


def end_a_prompt(other, model, vae):
    """What ComfyUI does after a prompt with a Spillway model in it, where it was asked to unload everything."""
    other.set_in_use_by_current_prompt(False)
    mm.unload_all_models()


WAYS = {
    "load now": lambda other, model, vae: SpillwayDeviceControl.execute(LOAD, "as it is", model, vae=vae),
    "unload": lambda other, model, vae: SpillwayDeviceControl.execute(UNLOAD, "as it is", model, vae=vae),
    "drop": lambda other, model, vae: SpillwayDeviceControl.execute(DROP, "as it is", model, vae=vae),
    "VAE Decode": lambda other, model, vae: SpillwayVAEDecode.execute({"samples": LATENT}, vae, 512),
    "room for a VAE": lambda other, model, vae: comfy_vae.free_everything(vae, lambda: None),
    "the route": lambda other, model, vae: routes.free(execution.PromptQueue(Server()), {"models": True, "pins": True}),
    "a prompt's end": end_a_prompt,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the finalizer's
@pytest.mark.parametrize("collected", [False, True], ids=["kept", "another is collected"])
def test_whatever_of_ours_comes_next_gets_past_it(models, checkpoint, way, collected):
    model, vae = models
    other = comfy_load.load_diffusion_model(checkpoint("flux", **SMALL, seed=1))
    wanted, picture = run(model), vae.decode(LATENT)
    if collected:
        mm.load_models_gpu([gone := comfy_load.load_diffusion_model(checkpoint("flux", **SMALL, seed=2))])
    unload_by_hand(model)
    if collected:  # its finalizer meets the entry, raises, and leaves another one
        del gone
        gc.collect()
    way(other, model, vae)
    assert all(entry.real_model is not None and entry.real_model() is not None for entry in mm.current_loaded_models)
    assert_same(run(model), wanted)
    assert torch.equal(vae.decode(LATENT), picture)
    mm.unload_all_models()
    assert not mm.current_loaded_models


def test_a_clip_loads_past_it(models, checkpoint):
    unload_by_hand(models[0])
    clip = comfy_load.load_clip([checkpoint("clip_l")])
    assert sampling.text_encode(clip, "a red house")[0].isfinite().all()


@pytest.mark.parametrize("again", ["the entry", "an entry that was never loaded"])
def test_an_unloaded_entry_unloaded_again(checkpoint, again):
    """ComfyUI's `model_unload` raises then, for any model. Ours has given all back before, and runs on."""
    model = comfy_load.load_diffusion_model(checkpoint("flux", **SMALL))
    wanted = run(model)
    entry = unload_by_hand(model) if again == "the entry" else mm.LoadedModel(model)
    with pytest.raises(AttributeError, match="detach"):
        entry.model_unload()
    assert model.loaded_size() == 0
    model.set_in_use_by_current_prompt(True)
    assert_same(run(model), wanted)


def test_two_threads_may_unload_all_models_at_once(models, monkeypatch):
    """ComfyUI's worker does so after a prompt, outside of any lock, and what it raises there ends it."""
    model, vae = models
    mm.load_models_gpu([model, vae.patcher])
    unload, inside, errors = mm.LoadedModel.model_unload, threading.Barrier(2), []

    def slowly(entry, *args, **kwargs):
        with contextlib.suppress(threading.BrokenBarrierError):
            inside.wait(0.5)  # as long as the other thread needs to come here, where nothing holds it off
        return unload(entry, *args, **kwargs)

    monkeypatch.setattr(mm.LoadedModel, "model_unload", slowly)

    def run_noting(call, *args):
        try:
            call(*args)
        except BaseException as error:
            errors.append(error)

    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    threads = [
        threading.Thread(target=run_noting, args=args)
        for args in ((mm.unload_all_models,), (routes.free, queue, {"models": True}))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors and not mm.current_loaded_models and not any(thread.is_alive() for thread in threads)
    assert run(model, steps=1).isfinite().all()


@pytest.mark.parametrize("load", [comfy_load.load_diffusion_model, comfy.sd.load_diffusion_model])
def test_a_model_that_only_a_cycle_holds_is_unloaded(load, checkpoint, monkeypatch):
    """The collector may run while it is unloaded, and ComfyUI asks an entry for its model's name afterwards."""
    model = load(checkpoint("flux", **SMALL))
    run(model, steps=1)
    kept = model.model  # as other clones keep it
    unload = mm.LoadedModel.model_unload

    def collecting(entry, *args, **kwargs):
        done = unload(entry, *args, **kwargs)
        gc.collect()
        return done

    monkeypatch.setattr(mm.LoadedModel, "model_unload", collecting)
    model.cycle = model
    del model
    mm.unload_all_models()
    assert not mm.current_loaded_models and kept is not None
