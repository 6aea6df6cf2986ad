"""Which layers get INT8 weights, and whether that pays."""

from collections import Counter

import pytest
import torch

from spillway.ops.int8.measure import measure
from spillway.patcher.quantised_layers import Int8Layers


@pytest.mark.parametrize(
    ("architecture", "name", "covered"),
    [
        ("Flux", "double_blocks.0.img_attn.qkv", True),
        ("Flux", "single_blocks.3.linear2", True),
        ("Flux", "double_blocks.0.img_mod.lin", False),
        ("Flux", "single_blocks.3.modulation.lin", False),
        ("Flux", "final_layer.adaLN_modulation.1", False),
        ("Flux", "img_in", False),
        ("Flux", "time_in.in_layer", False),
        ("Chroma", "distilled_guidance_layer.layers.0.in_layer", False),
        ("WanModel", "blocks.0.self_attn.q", True),
        ("WanModel", "blocks.0.ffn.0", True),
        ("WanModel", "text_embedding.0", False),
        ("WanModel", "time_projection.1", False),
        ("NextDiT", "layers.0.feed_forward.w1", True),
        ("NextDiT", "layers.0.adaLN_modulation.1", False),
        ("NextDiT", "cap_embedder.1", False),
        ("QwenImageTransformer2DModel", "transformer_blocks.0.attn.to_q", True),
        ("QwenImageTransformer2DModel", "transformer_blocks.0.img_mlp.net.0.proj", True),
        ("QwenImageTransformer2DModel", "transformer_blocks.0.img_mod.1", False),
        ("UNetModel", "input_blocks.1.1.transformer_blocks.0.attn1.to_q", True),
        ("UNetModel", "input_blocks.1.0.emb_layers.1", False),
        ("UNetModel", "time_embed.0", False),
        ("Unheard of", "blocks.7.mlp.fc1", True),
        ("Unheard of", "head", False),
    ],
)
def test_sensitive_layers(architecture, name, covered):
    layers = Int8Layers(architecture, "cpu", "diffusion_model.")
    assert layers.covers("diffusion_model." + name) is covered
    assert not layers.covers("text_model." + name)
    linear = torch.nn.Linear(128, 64)
    assert bool(layers(linear, "diffusion_model." + name, linear.weight)) is covered


def test_only_wide_linear_layers():
    layers = Int8Layers("Flux", "cpu")
    name = "double_blocks.0.img_mlp.0"
    for other in (torch.nn.Linear(32, 128), torch.nn.Linear(100, 128), torch.nn.Conv2d(128, 128, 1)):
        assert not layers(other, name, other.weight)
    norm = torch.nn.LayerNorm(128)
    assert not layers(norm, name, norm.weight)


def test_measurement():
    timing = measure(Counter({(256, 128): 3, (128, 128): 1}), torch.float32, torch.device("cpu"))
    assert [shape for shape, *_ in timing.shapes] == [(256, 128), (128, 128)]
    assert timing.gain > 0 and timing.wins is (timing.gain >= 1.05)
    assert "128->256" in timing.in_words() and f"{timing.gain:.2f}x" in timing.in_words()
    again = measure(Counter({(256, 128): 3, (128, 128): 1}), torch.float32, torch.device("cpu"))
    assert again == timing  # measured once
