"""INT8 Lazy Torch Compile on models from GGUF files."""

import comfy.sd
import comfy.utils
import torch._dynamo
import torch._dynamo.utils

from kit.comfyui.compiling import compiled, said, with_budget, with_strength
from kit.comfyui.pairs import assert_same, run
from kit.gguf_files import quantised_copy, write_gguf
from spillway.ops.compile import compiled_function as engine
from spillway.patcher.comfyui.loading.load import load_diffusion_model

WIDE = {"hidden": 256, "depth": 1, "depth_single": 1}


def test_a_compiled_model_gives_the_same_latents_and_recompiles_by_rank_alone(checkpoint, tmp_path):
    """Blocks are dequantised within the graph. A LoRA is a branch of the graph, so it is traced once for its rank."""
    plain_file = checkpoint("flux", **WIDE)
    written, _ = quantised_copy(comfy.utils.load_torch_file(plain_file), "Q4_K")
    gguf = write_gguf(tmp_path / "flux.gguf", written)
    lora = comfy.utils.load_torch_file(checkpoint("lora", base=plain_file))
    plain, model = load_diffusion_model(gguf), compiled(load_diffusion_model(gguf))
    assert_same(run(model, steps=1), run(plain, steps=1))
    graphs = engine.compile_count()
    assert graphs > 0
    counts = []
    for fraction, strength in ((0.25, 0.0), (0.0, 0.6), (1.0, 0.3)):
        got = run(with_strength(with_budget(model, fraction), lora, strength), steps=1)
        assert_same(got, run(with_strength(plain, lora, strength), steps=1))
        counts.append(engine.compile_count())
    assert counts[0] == graphs and counts[1] == counts[2]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not said(model, "uncompiled")
