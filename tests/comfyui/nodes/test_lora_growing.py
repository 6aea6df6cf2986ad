"""The stack that grows gives the latents of LoRA loaders in a row, whatever form its inputs have."""

import pytest
from comfy_api.latest import io

from kit.comfyui import checkpoints
from kit.comfyui.pairs import SMALL, assert_same, run
from spillway.nodes.lora import SpillwayLoraLoaderModelOnly
from spillway.nodes.lora_growing import FIXED, MOST, SpillwayGrowingLoraStack, SpillwayLora
from spillway.patcher.comfyui.loading.load import load_diffusion_model


def test_loras_are_applied_in_the_order_of_their_inputs(checkpoint, models_dir):
    path = checkpoint("flux", **SMALL)
    names = []
    for seed in range(2):
        names.append(f"growing-{seed}.safetensors")
        checkpoints.lora(models_dir / "loras" / names[-1], path, seed=seed)
    model = load_diffusion_model(path)
    wanted = model
    for name, strength in zip(names, (0.5, -1.0), strict=True):
        (wanted,) = SpillwayLoraLoaderModelOnly.execute(model=wanted, lora_name=name, strength_model=strength).args
    first, second, off = (
        SpillwayLora.execute(lora_name=name, strength_model=strength, strength_clip=0.0).args[0]
        for name, strength in ((names[0], 0.5), (names[1], -1.0), (names[1], 0.0))
    )
    latent = run(wanted)
    slots = {"lora10": second, "lora2": first, "lora3": off, "lora4": None}
    grown, clip = SpillwayGrowingLoraStack.execute(model=model, loras=slots).args
    assert clip is None
    assert_same(run(grown), latent)
    assert_same(run(SpillwayGrowingLoraStack.execute(model=model, **slots).args[0]), latent)
    assert_same(run(SpillwayGrowingLoraStack.execute(model=model).args[0]), run(model))
    with pytest.raises(ValueError, match="expected a wire of type SPILLWAY_LORA"):
        SpillwayGrowingLoraStack.execute(model=model, lora0="a name")
    with pytest.raises(ValueError, match="Connect it to a LoRA"):
        SpillwayGrowingLoraStack.execute(model=model, loras={"lora0": "a name"})


def test_inputs_grow_where_comfyui_can_and_are_many_elsewhere(monkeypatch):
    grown = SpillwayGrowingLoraStack.define_schema().inputs
    assert [entry.id for entry in grown] == ["model", "clip", "loras"] and grown[-1].template.max == MOST
    SpillwayGrowingLoraStack.VALIDATE_CLASS()
    monkeypatch.delattr(io, "Autogrow")
    fixed = SpillwayGrowingLoraStack.define_schema().inputs
    assert [entry.id for entry in fixed[2:]] == [f"lora{place}" for place in range(FIXED)]
    assert all(entry.optional for entry in fixed[2:])
