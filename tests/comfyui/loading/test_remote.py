"""ComfyUI's loaders and samplers on files that are still coming, poisoned where they have not come."""

import asyncio
import threading
from contextlib import nullcontext
from pathlib import Path

import comfy.model_management
import comfy.utils
import execution
import nodes as comfyui_nodes
import pytest
from comfy_extras.nodes_model_merging import ModelMergeSimple
from safetensors.torch import save_file

from kit.comfyui import sampling
from kit.comfyui.executor import Server, node_class
from kit.comfyui.loras import forms, with_lora
from kit.comfyui.pairs import SMALL, assert_same, classic_model, run
from kit.coming import settle, slowly
from kit.gguf_files import quantised_copy, write_gguf
from kit.range_server import serving
from spillway.nodes.load import SpillwayLoadDiffusionModel, model_path
from spillway.nodes.memory_report import in_lines, memory_report
from spillway.nodes.probe import SpillwayProbeModel
from spillway.nodes.remote import SpillwayRemoteModelFile
from spillway.ops.files.coming_file import coming_file
from spillway.ops.remote.store import Refused
from spillway.patcher.comfyui.loading.load import load_checkpoint, load_clip, load_diffusion_model, load_vae
from spillway.patcher.comfyui.patches.lora import read_lora
from spillway.patcher.comfyui.saving.save import save_model
from spillway.patcher.policy import Policy


def plainly(path):
    return run(load_diffusion_model(path))


USES = {
    "as it is": plainly,
    "with nothing resident": lambda path: run(load_diffusion_model(path, policy=Policy(vram_bytes=0))),
    "int8": lambda path: run(load_diffusion_model(path, "int8")),
    "fp8": lambda path: run(load_diffusion_model(path, "fp8_e4m3fn")),
    "with a LoRA": lambda path: run(with_lora(load_diffusion_model(path), forms("lora"))),
    "with a LoRA that needs the weight": lambda path: run(with_lora(load_diffusion_model(path), forms("dora"))),
}


@pytest.mark.parametrize("use", USES)
def test_a_model_that_is_coming_gives_the_latents_of_its_file(use, flux, tmp_path):
    wanted = USES[use](flux)
    with slowly(Path(flux), tmp_path) as (_, path):
        found = USES[use](str(path))
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", ["scaled_fp8", "int8_tensorwise", "nvfp4"])
def test_a_quantised_file_that_is_coming_gives_its_latents(kind, quantised_file, tmp_path):
    original = Path(quantised_file(kind))
    wanted = plainly(str(original))
    with slowly(original, tmp_path) as (_, path):
        found = plainly(str(path))
    assert_same(found, wanted)


def encoded(path, clip_type):
    return sampling.text_encode(load_clip([path], clip_type), "a red house")


KINDS = {
    "flux_as_diffusers": ({"hidden": 128, "depth": 1, "depth_single": 1}, plainly),
    "wan": ({"dim": 256, "layers": 2}, plainly),
    "z_image": ({"dim": 256, "layers": 2, "context": 256}, plainly),
    "lumina2": ({"dim": 288, "layers": 2}, plainly),
    "qwen_image": ({"dim": 256, "layers": 1}, plainly),
    "clip_l": ({}, lambda path: encoded(path, "stable_diffusion")),
    "t5_base": ({}, lambda path: encoded(path, "stable_audio")),
    "flux_vae": ({}, lambda path: sampling.vae_decode(load_vae(path), sampling.latent(16))),
}
ALWAYS = ("flux_as_diffusers", "clip_l", "flux_vae")


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_every_kind_of_file_can_be_used_while_it_comes(kind, checkpoint, tmp_path):
    options, use = KINDS[kind]
    original = Path(checkpoint(kind, **options))
    wanted = use(str(original))
    with slowly(original, tmp_path, block_bytes=64 << 10) as (_, path):
        found = use(str(path))
    assert_same(found, wanted)


def test_a_gguf_file_that_is_coming_gives_its_latents(flux, tmp_path):
    (tmp_path / "there").mkdir()
    tensors = comfy.utils.load_torch_file(flux)
    original = Path(write_gguf(tmp_path / "there" / "flux.gguf", quantised_copy(tensors, "Q4_0")[0]))
    wanted = plainly(str(original))
    with slowly(original, tmp_path) as (_, path):
        found = plainly(str(path))
    assert_same(found, wanted)


def test_others_models_take_all_of_a_file_that_is_coming(flux, checkpoint, tmp_path):
    """ComfyUI's own patcher merges the sources, and reads them where it likes."""
    other = checkpoint("flux", **SMALL, seed=5)

    def merged(path):
        return run(ModelMergeSimple().merge(classic_model(other), load_diffusion_model(path), 0.3)[0])

    wanted = merged(flux)
    with slowly(Path(flux), tmp_path) as (_, path):
        found = merged(str(path))
    assert_same(found, wanted)


def test_a_lora_and_a_classic_model_wait_for_all_of_their_file(flux, tmp_path):
    (tmp_path / "there").mkdir()
    original = tmp_path / "there" / "lora.safetensors"
    save_file(forms("lora"), original)
    wanted, classic = read_lora(str(original))[0], run(load_diffusion_model(flux, disable_dynamic=True))
    with slowly(original, tmp_path) as (_, path):
        found = read_lora(str(path))[0]
    assert found.keys() == wanted.keys()
    assert_same([found[key] for key in wanted], list(wanted.values()))
    with slowly(Path(flux), tmp_path) as (_, path):
        latent = run(load_diffusion_model(str(path), disable_dynamic=True))
    assert_same(latent, classic)


def test_a_model_that_is_coming_is_saved(flux, tmp_path):
    save_model(str(tmp_path / "wanted.safetensors"), load_diffusion_model(flux), dtype="fp16")
    with slowly(Path(flux), tmp_path) as (_, path):
        save_model(str(tmp_path / "found.safetensors"), load_diffusion_model(str(path)), dtype="fp16")
    assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()


@pytest.fixture
def sd15(checkpoint):
    return checkpoint("sd15", mult=(1,))


def test_a_checkpoints_first_latent_comes_before_its_last_byte(sd15, tmp_path):
    """The text encoder brings the rows of its tokens, and the VAE comes last."""

    def made(path):
        model, clip, vae, _ = load_checkpoint(path)
        cond = clip.encode_from_tokens_scheduled(clip.tokenize("a red house"))
        return sampling.sample(model, 2, width=64, height=64, cond=(cond, cond)), vae

    latent, vae = made(sd15)
    picture = vae.decode(latent)
    size = Path(sd15).stat().st_size
    with slowly(Path(sd15), tmp_path, block_bytes=64 << 10) as (server, path):
        found, vae = made(str(path))
        sent = server.sent
        found_picture = vae.decode(found)
    assert_same(found, latent)
    assert_same(found_picture, picture)
    assert sent < 0.7 * size, f"{sent} of {size} bytes were sent"


# -- the nodes, in ComfyUI's executor


KEPT = []
NODES = {
    "SpillwayRemoteModelFile": SpillwayRemoteModelFile,
    "SpillwayLoadDiffusionModel": SpillwayLoadDiffusionModel,
    "Sample": node_class("Sample", lambda a=None, **_: (KEPT.append(run(a, 1)) or KEPT[-1], a)),
    "Save": node_class("Save", lambda **_: {"result": (None, None)}, True),
}


@pytest.fixture
def queue(monkeypatch):
    """Run the graph with a file's address in ComfyUI's executor. Returns the messages of the prompt."""
    for name, kind in NODES.items():
        monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, name, kind)
        if hasattr(kind, "GET_SCHEMA"):
            kind.GET_SCHEMA()
    executor = execution.PromptExecutor(
        Server(), execution.CacheType.CLASSIC, {"lru": 1, "ram": 2.0, "ram_inactive": 64.0}
    )

    def run_graph(address, seed=1, wait=False):
        graph = {
            "file": ("SpillwayRemoteModelFile", {"address": address, "folder": "diffusion_models", "wait": wait}),
            "model": ("SpillwayLoadDiffusionModel", {"unet_name": ["file", 0], "weight_dtype": "default"}),
            "latent": ("Sample", {"a": ["model", 0], "value": seed}),
            "save": ("Save", {"a": ["latent", 0]}),
        }
        prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}
        valid = asyncio.run(execution.validate_prompt("1", prompt, ["save"]))
        assert valid[0], valid
        KEPT.clear()
        asyncio.run(executor.execute_async(prompt, "1", {}, ["save"]))
        return executor

    yield run_graph
    executor.reset()


@pytest.fixture
def remote(flux, models_dir):
    """(server, the path that the file of the address gets)"""
    path = models_dir / "diffusion_models" / Path(flux).name
    with serving(Path(flux).parent) as server:
        yield server, path
        server.gate.set()
        coming = coming_file(path)
        if coming is not None:
            coming.wait()
            settle(path)
    path.unlink(missing_ok=True)


def cached(executor):
    return next(data["nodes"] for name, data in executor.status_messages if name == "execution_cached")


def test_the_nodes_run_a_model_while_it_comes_and_load_it_once(queue, remote, flux):
    server, path = remote
    wanted = run(load_diffusion_model(flux), 1)
    server.gate.clear()
    threading.Timer(0.5, server.gate.set).start()
    done = queue(server.address(path.name))
    assert done.success, done.status_messages
    assert_same(KEPT, [wanted])
    settle(path)
    assert path.read_bytes() == Path(flux).read_bytes()
    assert model_path("diffusion_models", path.name) == str(path)
    again = queue(server.address(path.name), seed=2)
    assert again.success and set(cached(again)) >= {"file", "model"}, again.status_messages
    assert_same(KEPT, [wanted])
    path.unlink()  # the user did
    server.asked.clear()
    assert queue(server.address(path.name), seed=2, wait=True).success and server.asked


def test_an_interrupt_ends_the_wait_and_the_next_prompt_goes_on(queue, remote, flux):
    server, path = remote
    wanted = run(load_diffusion_model(flux), 1)
    server.gate.clear()
    threading.Timer(1.5, comfy.model_management.interrupt_current_processing).start()
    stopped = queue(server.address(path.name))
    assert not stopped.success
    assert stopped.status_messages[-1][0] == "execution_interrupted", stopped.status_messages
    server.gate.set()
    done = queue(server.address(path.name))
    assert done.success, done.status_messages
    assert_same(KEPT, [wanted])


def test_a_server_that_goes_fails_the_prompt_and_the_next_one_goes_on(queue, remote, flux):
    server, path = remote
    wanted = run(load_diffusion_model(flux), 1)
    server.gate.clear()
    server.opened = 256 << 10
    assert memory_report()["coming"] == []
    threading.Timer(1.0, lambda: (setattr(server, "fault", "gone"), server.gate.set())).start()
    failed = queue(server.address(path.name))
    assert not failed.success
    assert "the server answered 404" in failed.status_messages[-1][1]["exception_message"]
    (told,) = memory_report()["coming"]
    assert told["file"] == path.name and 0 < told["come_bytes"] < told["total_bytes"] == Path(flux).stat().st_size
    assert f"Coming: {path.name} from {server.address(path.name)}: " in in_lines(memory_report())
    assert "no more comes: " in in_lines(memory_report()) and "answered 404" in told["stopped"]
    server.fault = ""
    done = queue(server.address(path.name))
    assert done.success, done.status_messages
    assert_same(KEPT, [wanted])
    settle(path)
    assert memory_report()["coming"] == []


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"address": "https://server/model.ckpt"}, "is no safetensors or GGUF file"),
        ({"address": "https://server/download?id=7"}, "'download' is no safetensors"),
        ({"address": "https://server/a.safetensors", "name": "../a.safetensors"}, "is no name for a file"),
        ({"address": "https://server/"}, "is no name for a file"),
    ],
)
def test_a_name_that_makes_no_sense_is_refused_before_anything_is_asked(inputs, words):
    with pytest.raises(ValueError, match=words):
        SpillwayRemoteModelFile.execute(folder="vae", **inputs)


@pytest.mark.parametrize(
    ("listen", "told", "allowed"),
    [
        ("127.0.0.1", "", True),
        ("localhost,::1", "", True),
        ("0.0.0.0,::", "", False),
        ("192.168.1.5", "", False),
        ("127.0.0.1", "off", False),
        ("0.0.0.0", "file:///", True),
    ],
)
def test_a_file_of_this_machine_is_brought_to_those_who_may(listen, told, allowed, flux, models_dir, monkeypatch):
    monkeypatch.setattr("comfy.cli_args.args.listen", listen)
    monkeypatch.setenv("SPILLWAY_REMOTE", told)
    path = models_dir / "diffusion_models" / "brought.safetensors"
    asked = [
        lambda: SpillwayRemoteModelFile.execute(Path(flux).as_uri(), "diffusion_models", path.name, True),
        lambda: SpillwayProbeModel.execute("none", f" {Path(flux).as_uri()}"),
    ]
    for ask in asked:
        with nullcontext() if allowed else pytest.raises(Refused, match="SPILLWAY_REMOTE"):
            ask()
    assert path.exists() == allowed
    path.unlink(missing_ok=True)


def test_the_probe_node_brings_the_header_alone(remote, flux):
    server, path = remote
    said = SpillwayProbeModel.execute("none", server.address(path.name)).args[0]
    assert "diffusion model, Flux" in said and server.sent < Path(flux).stat().st_size / 2
    assert not path.exists() and coming_file(path) is None
