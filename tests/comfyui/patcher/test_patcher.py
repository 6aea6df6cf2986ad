"""DynamicModelPatcher as ComfyUI uses it: loading, clones, unloading, saving, and leaving no trace."""

import gc
from contextlib import nullcontext

import comfy.memory_management
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.utils
import pytest
import safetensors.torch
import torch

from kit.comfyui import sampling
from kit.comfyui.dynamic_vram import holds_some, told
from kit.comfyui.loras import QKV, SHAPES, forms, with_lora
from kit.comfyui.on_device import comfyuis_dynamic_models
from kit.comfyui.pairs import SMALL, assert_same, budget, comfyui_vae, pair, run
from spillway.ops.lending.layer import DynamicLayer
from spillway.ops.ram import allocator
from spillway.patcher import ram_pressure
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.comfyui.loading.loader_overrides import building
from spillway.patcher.comfyui.patcher import DynamicModelPatcher
from spillway.patcher.policy import Policy

CPU = torch.device("cpu")
DEVICE = mm.get_torch_device()


# --- what ComfyUI reads ----------------------------------------------------------------------------------------------


def test_the_sizes_that_comfyui_asks_for_follow_what_is_resident(flux):
    _, ours = pair(flux, 0.5)
    assert ours.is_dynamic() and not ours.model.model_lowvram
    assert ours.loaded_size() == ours.pinned_memory_size() == ours.loaded_ram_size() == 0
    run(ours)
    dynamic = ours.dynamic
    # Buffers are moved to a device of its own, and count there.
    assert ours.loaded_size() == dynamic.resident_bytes + dynamic.placed_bytes + dynamic.buffer_bytes
    assert (dynamic.resident_bytes > 0) == holds_some(ours.policy)
    assert ours.model_size() >= sum(t.nbytes for t in ours.model.diffusion_model.state_dict().values())
    assert ours.current_loaded_device() == DEVICE and ours.lowvram_patch_counter() == 0
    ours = with_lora(ours, forms("lora"))
    ours.set_policy(Policy(vram_bytes=0, pinned_bytes=1 << 30))
    run(ours)
    assert dynamic.resident_bytes == 0 and ours.pinned_memory_size() == ours.loaded_ram_size() > 0
    pins = ours.model.dynamic_pins[ours.load_device]
    assert {"active", "current_prompt", "weights", "patches"} <= set(pins)
    ours.set_in_use_by_current_prompt(True)
    assert pins["current_prompt"]
    assert ours.partially_unload_ram(1e32) > 0 and ours.pinned_memory_size() == 0


def test_a_clone_has_patches_options_and_policy_of_its_own(flux):
    """A clone is another patcher of the same model: its patches, options and policy are its own."""
    classic, ours = pair(flux, 0.5)
    ours.policy = ours.policy.with_changes(priority=3)
    clone = ours.clone()
    assert type(clone) is DynamicModelPatcher and clone.is_clone(ours) and clone.model is ours.model
    assert clone.policy == ours.policy and clone.dynamic is ours.dynamic
    assert clone.clone_has_same_weights(ours)
    patched = with_lora(clone, forms("lora"))
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0)
    patched.set_policy(Policy(vram_bytes=0))
    assert not ours.patches and "sampler_post_cfg_function" not in ours.model_options
    assert not patched.clone_has_same_weights(ours) and clone.policy.vram_bytes
    assert_same(run(clone), run(classic))


def test_a_classic_clone_is_comfyuis_patcher_with_patches_and_options(flux):
    """`clone(disable_dynamic=True)`, as nodes that compile ask for: ComfyUI's patcher, with patches and options."""
    classic, ours = pair(flux, 0.0)
    for model in (ours, with_lora(ours, forms("lora"))):
        clone = model.clone(disable_dynamic=True)
        assert type(clone) is comfy.model_patcher.ModelPatcher and not clone.is_dynamic()
        assert clone.model is not model.model
        assert_same(run(clone), run(with_lora(classic, forms("lora")) if model.patches else classic))
    assert_same(run(ours), run(classic))


def test_a_clone_for_another_device_has_a_model_of_its_own(flux):
    if not hasattr(comfy.model_patcher.ModelPatcher, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no clones for other devices")
    classic, ours = pair(flux, 0.5)
    ours = with_lora(ours, forms("lora"))
    other = ours.deepclone_multigpu(new_load_device=CPU)
    assert other.is_dynamic() and other.model is not ours.model
    classic = with_lora(classic, forms("lora"))
    # Of its own kind: a CPU applies a LoRA in another dtype than a device does that computes in 16 bit.
    assert_same(run(other), run(classic.deepclone_multigpu(new_load_device=CPU)))
    assert_same(run(ours), run(classic))


# --- loading and unloading --------------------------------------------------------------------------------------------


@told
def test_negative_memory_is_a_partial_unload(flux):
    classic, ours = pair(flux, 1.0)
    wanted = run(classic)
    assert_same(run(ours), wanted)
    before = ours.loaded_size()
    returned = ours.partially_load(CPU, extra_memory=-before // 2)
    assert 0 < ours.loaded_size() <= before - before // 2 and returned == ours.loaded_size() - before
    held = ours.dynamic.resident_bytes
    assert (ours.partially_unload(CPU, 1) > 0) == (held > 0)
    assert_same(run(ours), wanted)
    assert ours.loaded_size() == before


def test_patches_are_checked_before_a_partial_unload(flux):
    """A clone with other patches that is asked to shrink must not run with those of the one before it."""
    classic, ours = pair(flux, 1.0)
    run(ours)
    patched = with_lora(ours, forms("diff"))
    patched.partially_load(CPU, extra_memory=-ours.loaded_size() // 4)
    assert ours.model.current_weight_patches_uuid == patched.patches_uuid
    assert set(ours.state.patches) >= {f"{stem}.weight" for stem in SHAPES}
    mm.load_models_gpu([patched])
    assert_same(run(patched), run(with_lora(classic, forms("diff"))))


def test_the_model_carries_the_uuid_of_the_patches_that_are_attached(flux):
    _, ours = pair(flux, 1.0)
    patched = with_lora(ours, forms("lora"))
    for model in (ours, patched, ours):
        mm.load_models_gpu([model])
        assert model.model.current_weight_patches_uuid == model.patches_uuid
    ours.detach()
    assert ours.model.current_weight_patches_uuid is None and ours.loaded_size() == 0


def test_dynamic_models_do_not_unload_each_other(flux, checkpoint):
    """They give way page by page, so ComfyUI leaves them where they are; for others they make room."""
    first, second = (pair(path, 1.0)[1] for path in (flux, checkpoint("flux", **SMALL, seed=1)))
    run(first)
    run(second)
    sizes = first.loaded_size(), second.loaded_size()
    mm.free_memory(1e30, DEVICE, for_dynamic=True)
    assert (first.loaded_size(), second.loaded_size()) == sizes
    assert {first, second} <= set(mm.loaded_models())
    mm.free_memory(1e30, DEVICE)
    assert first.loaded_size() == second.loaded_size() == 0
    assert not {first, second} & set(mm.loaded_models())


def test_a_model_that_is_kept_always_gives_nothing_to_others(flux):
    """Other models get nothing of one that its policy keeps; to unload everything is still possible."""
    _, ours = pair(flux, 1.0)
    ours.set_policy(ours.policy.with_changes(keep="always"))
    run(ours)
    size = ours.loaded_size()
    (loaded,) = (loaded for loaded in mm.current_loaded_models if loaded.model is ours)
    assert not loaded.model_unload(size // 2)
    assert ours.loaded_size() == size
    mm.unload_all_models()
    assert ours.loaded_size() == 0


def test_a_detached_model_is_the_files_again_and_can_run_again(flux):
    classic, ours = pair(flux, 0.5)
    ours = with_lora(ours, forms("lora"))
    wanted = run(with_lora(classic, forms("lora")))
    counters, written = ours.dynamic.ledger.counters, []
    for _ in range(2):
        assert_same(run(ours), wanted)
        ours.detach()
        assert ours.loaded_size() == 0
        # What the LoRA made of weights without room stays in RAM, so it is not computed again.
        assert ours.pinned_memory_size() > 0
        written.append(counters.write_backs)
    assert written[0] == written[1] > 0
    assert ours.partially_unload_ram(1e32) > 0
    assert ours.pinned_memory_size() == 0
    mm.unload_all_models()
    assert_same(run(ours), wanted)


# --- no trace ---------------------------------------------------------------------------------------------------------


def traces(model):
    """What an engine changes on ComfyUI's modules."""
    out = {}
    for name, module in model.named_modules():
        functions = [module.__dict__.get(attr, "class") for attr in ("weight_function", "bias_function")]
        cast = [module.__dict__.get(attr, "class") for attr in ("comfy_cast_weights", "comfy_force_cast_weights")]
        own = [attr for attr in module.__dict__ if attr in ("spillway_bundle", "spillway_caster", "forward")]
        plain = getattr(type(module), "spillway_original_class", type(module))  # ours are born dynamic
        out[name] = plain, functions, cast, own, [id(p) for p in module._parameters.values()]
    return out


@pytest.mark.parametrize("how", ["loaded by us", "made dynamic"])
def test_the_modules_are_comfyuis_again_when_the_last_patcher_goes(how, flux):
    """When the last patcher of a model goes, its modules are as ComfyUI's loader left them."""
    if how == "loaded by us":
        ours = comfy_load.load_diffusion_model(flux)
    else:
        from spillway.patcher.comfyui.loading.adopt import dynamic_model

        classic = comfy.sd.load_diffusion_model(flux)
        classic.cached_patcher_init = None
        ours = dynamic_model(classic)
        ours.state.close()
    model, before = ours.model, traces(ours.model)
    patched = with_lora(ours, forms("lora"))
    patched.add_weight_wrapper(f"{QKV}.weight", lambda weight: weight)
    patched.force_cast_weights = True
    run(patched)
    run(ours)
    layers = [module for module in model.diffusion_model.modules() if list(module.parameters(recurse=False))]
    assert all(isinstance(layer, DynamicLayer) for layer in layers)
    assert traces(model) != before
    mm.unload_all_models()
    del ours, patched
    gc.collect()
    assert traces(model) == before
    if how == "made dynamic":
        assert not any(isinstance(module, DynamicLayer) for module in model.modules())
    assert not model.spillway_state.patchers and model.spillway_state.dynamic is None


def test_a_dropped_model_is_freed(flux):
    """Nothing keeps a model whose patchers are gone: not ComfyUI's lists, not the engine's, no thread, no file."""
    import weakref

    from spillway.ops.files.disk_map import open_maps
    from spillway.patcher import dynamic_model as dynamic

    gc.collect()
    maps, models = len(list(open_maps())), len(dynamic.models)
    ours = with_lora(comfy_load.load_diffusion_model(flux), forms("lora"))
    run(ours)
    refs = [weakref.ref(ours), weakref.ref(ours.model), weakref.ref(ours.dynamic)]
    del ours
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    assert len(list(open_maps())) == maps and len(dynamic.models) == models


# --- ComfyUI's own dynamic VRAM --------------------------------------------------------------------------------------


def test_models_loaded_while_dynamic_vram_is_on_are_right(checkpoint, flux, monkeypatch):
    """ComfyUI then makes its layers without weights and fills them from the file."""
    if not hasattr(comfy.memory_management, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    classic, _ = pair(flux)
    latent, text = sampling.latent(16, 32, 32), "a red house"
    wanted = (
        run(with_lora(classic, forms("lora"))),
        sampling.text_encode(comfy.sd.load_clip([checkpoint("clip_l")]), text),
    )
    picture = sampling.vae_decode(comfyui_vae(checkpoint("flux_vae")), latent)
    with monkeypatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        ours = comfy_load.load_diffusion_model(flux, policy=budget(classic, 0.25))
        clip = comfy_load.load_clip([checkpoint("clip_l")], policy=Policy(vram_bytes=0))
        vae = comfy_load.load_vae(checkpoint("flux_vae"), policy=Policy(vram_bytes=0))
    assert not any(parameter.is_meta for parameter in ours.model.parameters())
    assert_same(run(with_lora(ours, forms("lora"))), wanted[0])
    assert_same(sampling.text_encode(clip, text), wanted[1])
    assert_same(sampling.vae_decode(vae, latent), picture)


def test_a_text_encoder_on_a_cpu_keeps_the_numbers_of_its_file(checkpoint, monkeypatch):
    """With dynamic VRAM on, ComfyUI rounds its norms to the model's dtype there, and its linear layers never."""
    if not hasattr(comfy.memory_management, "aimdo_enabled"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    path, text = checkpoint("clip_l", dtype=torch.bfloat16), "a red house"
    on_cpu = {"load_device": CPU, "offload_device": CPU}
    tensors = safetensors.torch.load_file(path)  # comfy-aimdo's mapping of a file needs a device
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    with comfyuis_dynamic_models():
        wanted = sampling.text_encode(comfy.sd.load_text_encoder_state_dicts([tensors], model_options=on_cpu), text)
    with building(DynamicModelPatcher, Policy(vram_bytes=0)):
        clip = comfy.sd.load_clip([path], model_options=on_cpu)
    assert_same(sampling.text_encode(clip, text), wanted)


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {"dtype": torch.float32}), (torch.bfloat16, {"dtype": torch.bfloat16})]
)
def test_comfyuis_save_node_writes_of_our_model_what_it_writes_of_its_own(dtype, options, checkpoint, tmp_path):
    """What ModelSave writes of a patched model is what ComfyUI writes, in the file's dtype (ComfyUI: the model's)."""
    path = checkpoint("flux", **SMALL, dtype=dtype)
    classic = with_lora(comfy.sd.load_diffusion_model(path, model_options=options), forms("lora"), 0.5)
    ours = with_lora(comfy_load.load_diffusion_model(path, policy=Policy(vram_bytes=1 << 20)), forms("lora"), 0.5)
    saved = []
    for name, model in (("comfyui", classic), ("ours", ours)):
        comfy.sd.save_checkpoint(str(tmp_path / f"{name}.safetensors"), model)
        saved.append(comfy.utils.load_torch_file(str(tmp_path / f"{name}.safetensors")))
    assert saved[0].keys() == saved[1].keys()
    for key in saved[0]:
        assert_same(saved[1][key], saved[0][key])
    plain = comfy_load.load_diffusion_model(path).model.state_dict()
    changed = [key for key in plain if not torch.equal(plain[key], saved[1].get(f"model.{key}", plain[key]))]
    assert sorted(changed) == sorted(f"{stem}.weight" for stem in SHAPES)


def test_the_state_dict_is_the_files(flux):
    """Other nodes read a model's weights by its state dict: they get the file's, patched or not, lent or not."""
    ours = with_lora(comfy_load.load_diffusion_model(flux), forms("lora"))
    original = comfy.utils.load_torch_file(flux)
    for _ in range(2):
        state = ours.model_state_dict("diffusion_model.")
        for key, tensor in original.items():
            name = key.replace("_norm.scale", "_norm.weight")
            found = [state[f"diffusion_model.{part}"] for part in (key, name) if f"diffusion_model.{part}" in state]
            assert_same(found[0], tensor)
        run(ours)


# --- VAE --------------------------------------------------------------------------------------------------------------


def test_a_vae_in_tiles_gives_comfyuis_pictures(checkpoint):
    path = checkpoint("flux_vae")
    classic = comfyui_vae(path)
    latent, picture = sampling.latent(16, 48, 48), sampling.image(48, 48)
    results = []
    for vae in (classic, *(comfy_load.load_vae(path, budget(classic.patcher, fraction)) for fraction in (1.0, 0.0))):
        decoded = vae.decode_tiled(latent, tile_x=4, tile_y=4, overlap=1)
        results.append((decoded, vae.encode_tiled(picture, tile_x=32, tile_y=32, overlap=8)))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize(("sizes", "stay"), [(0.9, False), (1.1, True)])
def test_pins_of_other_models_give_way_to_the_size_of_a_loaded_one(sizes, stay, checkpoint, monkeypatch):
    """For its pins, which take the place of its pages in the cache."""
    gc.collect()  # models of other tests would give theirs first
    path = checkpoint("flux", **SMALL)
    other = with_lora(
        comfy_load.load_diffusion_model(path, policy=Policy(vram_bytes=0, pinned_bytes=1 << 30)), forms("lora")
    )
    run(other)
    held = other.dynamic.pinned_bytes
    assert held
    model = comfy_load.load_diffusion_model(path)
    monkeypatch.setattr(ram_pressure, "available_ram", lambda: int(sizes * model.model_size()))
    model.load(model.load_device)
    assert (other.dynamic.pinned_bytes == held) == stay


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_on_a_cpu_keeps_blocks_for_the_next_and_the_end_gives_them_back(flux, monkeypatch, fails):
    monkeypatch.setattr(allocator, "tuned", True)
    model = comfy_load.load_diffusion_model(flux)
    on_cpu = model.load_device.type == "cpu"
    seen = []

    def look(*_):
        seen.append(allocator.threshold)
        if fails:
            raise ValueError("stopped")

    try:
        with pytest.raises(ValueError, match="stopped") if fails else nullcontext():
            sampling.sample(model, steps=2, width=32, height=32, callback=look)
        assert set(seen) == {allocator.COMPUTING_THRESHOLD if on_cpu else allocator.MMAP_THRESHOLD}
        assert allocator.threshold == allocator.MMAP_THRESHOLD
    finally:
        allocator.end_computing()
