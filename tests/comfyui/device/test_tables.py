"""Text encoders whose token embeddings stay in their file: ComfyUI's conditioning, for the bytes of the rows."""

import inspect
from pathlib import Path

import comfy.lora
import comfy.model_management as mm
import comfy.sd
import folder_paths
import pytest
import safetensors.torch
import torch

from kit.comfyui import checkpoints
from kit.comfyui.loras import numbers
from kit.comfyui.pairs import assert_same, counters
from kit.comfyui.quantised import quantised
from kit.comfyui.sampling import text_encode
from spillway.ops.gather import is_wrapper
from spillway.ops.lending.table import Table
from spillway.patcher.comfyui.loading import load as comfy_load
from spillway.patcher.policy import Policy

TEXTS = ("a small red house by the sea", "an (oil painting:1.3) of [two] foxes, embedding:style2 and a fox")
KINDS = {
    # Kind of file, its options, ComfyUI's name of it, the table's name, its width.
    "clip": ("clip_l", {"layers": 2}, "stable_diffusion", "text_model.embeddings.token_embedding", 768),
    "t5": ("t5_base", {"layers": 2}, "stable_audio", "shared", 768),
}
OPTIONS = {"clip": {"clip_layers": 2}, "t5": {"t5_layers": 2}}
LAYER = {"clip": "text_model.encoder.layers.0.mlp.fc1", "t5": "encoder.block.0.layer.1.DenseReluDense.wi"}
CLASSIC = {"disable_dynamic": True} if "disable_dynamic" in inspect.signature(comfy.sd.load_clip).parameters else {}
CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
SCALES = {"int8_tensorwise": {"per_channel": True}, "float8_e4m3fn": {}}
ALL, SOME = Policy(headroom_bytes=0), Policy(vram_bytes=6 << 20, headroom_bytes=0)


@pytest.fixture
def loaded(checkpoint, monkeypatch):
    """``loaded(kind, ALL, CARD, quantisation)``: what loads ComfyUI's own and ours of one file."""
    embeddings = Path(folder_paths.get_folder_paths("embeddings")[0])
    embeddings.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({"emb_params": numbers(2, 768)}, embeddings / "style2.safetensors")
    original = comfy.sd.load_clip

    def load(kind, policy, device=CARD, quantisation=None):
        name, options, clip_type, table, _ = KINDS[kind]
        path = checkpoint(name, **options)
        if quantisation is not None:
            path = quantised(f"{path}.{quantisation}.safetensors", path, quantisation, (table,), **SCALES[quantisation])

        def small(**named):
            named["model_options"] = {**named.get("model_options", {}), **checkpoints.small_options(**OPTIONS[kind])}
            named["model_options"] |= {"load_device": device, "offload_device": CPU}
            if quantisation is not None:  # which ComfyUI's loaders of larger models find out
                named["model_options"]["quantization_metadata"] = {"mixed_ops": True}
            return original(**named)

        monkeypatch.setattr(comfy.sd, "load_clip", small)
        directory = folder_paths.get_folder_paths("embeddings")
        kind_of = comfy.sd.CLIPType[clip_type.upper()]
        # With dynamic VRAM ComfyUI patches embeddings at their use: one in INT8 fails there.
        yield small(ckpt_paths=[path], clip_type=kind_of, embedding_directory=directory, **CLASSIC)
        yield comfy_load.load_clip([path], clip_type, policy, directory)

    return load


def table_of(clip):
    (table,) = [bundle for bundle in clip.patcher.dynamic.bundles if isinstance(bundle, Table)]
    return table


def key_of_table(clip):
    ends = tuple(f"{kind[3]}.weight" for kind in KINDS.values())
    (key,) = [key for key in clip.patcher.model.state_dict() if key.endswith(ends)]
    return key


def patched(clip, kind, form):
    stem = key_of_table(clip).removesuffix(f"{KINDS[kind][3]}.weight")
    clip = clip.clone()
    layer, table = f"{stem}{LAYER[kind]}.weight", key_of_table(clip)
    shape = clip.patcher.model.state_dict()[layer].shape
    rows, width = clip.patcher.model.state_dict()[table].shape
    patches = {layer: ("diff", (numbers(*shape, scale=0.01),))}
    if form == "diff":
        patches[table] = ("diff", (numbers(64, width, scale=0.01).repeat(rows // 64, 1),))
    if form == "lora":
        lora = {f"{table}.lora_up.weight": numbers(rows, 4), f"{table}.lora_down.weight": numbers(4, width, scale=0.01)}
        patches.update(comfy.lora.load_lora(lora, {table: table}, log_missing=False))
    assert clip.patcher.add_patches(patches, 0.7)
    return clip


def encoded(clip):
    return [part for text in TEXTS for part in text_encode(clip, text)]


def assert_it_brings_rows(clip, kind):
    """Those of the text's tokens, and little else than the layers that are not resident."""
    table = table_of(clip)
    assert table.by_rows and table.vbar_slice is None, list(clip.patcher.dynamic.ledger.decisions)
    before = counters(clip.patcher)
    text_encode(clip, TEXTS[0])
    after = counters(clip.patcher)
    tokens = {token for batches in clip.tokenize(TEXTS[0]).values() for batch in batches for token, _ in batch}
    if clip.patcher.dynamic.backend.in_place and table.in_place:
        assert after.rows == before.rows
        return
    assert after.rows - before.rows == len(tokens)
    residency = clip.patcher.dynamic.residency
    layers = sum(bundle.source_bytes for bundle in residency.bundles if not residency.is_resident(bundle))
    rows = len(tokens) * table.source_bytes // table.params[0].source.shape[0]
    assert rows <= after.bytes_streamed - before.bytes_streamed <= rows + layers


@pytest.mark.parametrize(("kind", "device"), [("clip", CARD), ("t5", CPU)])
def test_conditioning_is_comfyuis(card, loaded, kind, device):
    """With textual inversion, patches of layers, and patches of the table that need single rows or the whole."""
    outputs = []
    for clip in loaded(kind, SOME, device):
        forms = [patched(clip, kind, form) for form in ("layers", "diff", "lora")]
        outputs.append([encoded(one) for one in (clip, *forms, clip)])
        mm.unload_all_models()
    wanted, got = outputs
    assert not torch.equal(wanted[0][0], wanted[2][0]) and not torch.equal(wanted[0][0], wanted[3][0])
    for one, other in zip(got, wanted, strict=True):
        assert_same(one, other)
    assert_it_brings_rows(clip, kind)


@pytest.mark.parametrize(
    ("kind", "quantisation"),
    [("clip", "int8_tensorwise"), pytest.param("t5", "float8_e4m3fn", marks=pytest.mark.slow)],
)
def test_a_quantised_table_brings_its_rows_and_their_scales(card, loaded, kind, quantisation):
    outputs = []
    for clip in loaded(kind, ALL, CARD, quantisation):
        outputs.append([encoded(one) for one in (clip, patched(clip, kind, "diff"), clip)])
        mm.unload_all_models()
    for one, other in zip(*outputs, strict=True):
        assert_same(one, other)
    assert is_wrapper(table_of(clip).params[0].source)
    assert_it_brings_rows(clip, kind)
