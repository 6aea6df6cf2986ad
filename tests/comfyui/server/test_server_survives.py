"""What must never take a ComfyUI server down: settings, files and prompts that make no sense."""

import json
import os

import pytest

from kit.comfyui.running_server import Server, node
from spillway.ops import settings


def simple(text="a"):
    """A prompt that needs no model, and is new for each text."""
    return {
        "image": node("EmptyImage", width=8, height=8, batch_size=1, color=7),
        "report": node("SpillwayMemoryReport", value=["image", 0]),
        "save": node("SaveImage", images=["image", 0], filename_prefix=text),
    }


def half_of_a_character():
    """A file whose tensors have names that JSON can hold and no log can."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"\ud800.lora_up.weight": entry, "\ud800.lora_down.weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    base = tmp_path_factory.mktemp("server")
    files = {"checkpoints/sd15": checkpoint("sd15"), "vae/flux": checkpoint("flux_vae")}
    for name, path in files.items():
        (base / "models" / name).parent.mkdir(parents=True)
        os.symlink(path, base / "models" / f"{name}.safetensors")
    (base / "models" / "vae" / "damaged.safetensors").write_bytes(b"no header")
    for folder in ("vae", "loras"):
        (base / "models" / folder).mkdir(exist_ok=True)
        (base / "models" / folder / "half.safetensors").write_bytes(half_of_a_character())
    with Server(base) as running:
        yield running


def make_dynamic(**given):
    """A prompt that uses what Make Dynamic gives."""
    wires = {"model": ["load", 0], "clip": ["load", 1], "vae": ["load", 2], **given}
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
        "dynamic": node("SpillwayMakeDynamic", **wires),
        "report": node("SpillwayMemoryReport", value=["dynamic", 0]),
    }


def load_vae(policy):
    return {
        "any": node("SpillwayCachePolicy", value="always", headroom_gb=-1.0, never_evict=False, disk_gb=-1.0),
        "load": node("SpillwayLoadVAE", vae_name="flux.safetensors", policy=policy),
        "report": node("SpillwayMemoryReport", value=["load", 0]),
    }


WRONG = {
    "Make Dynamic, policy": (
        make_dynamic(policy="x"),
        "the input 'policy' is 'x' (str); expected a wire of type SPILLWAY_POLICY",
    ),
    "Make Dynamic, model": (make_dynamic(model=7), "the input 'model' is 7 (int); expected a wire of type MODEL"),
    "Make Dynamic, clip": (
        make_dynamic(clip={"a": 1}),
        "the input 'clip' is {'a': 1} (dict); expected a wire of type CLIP",
    ),
    "Load VAE, policy": (load_vae(True), "the input 'policy' is True (bool); expected a wire of type SPILLWAY_POLICY"),
    "by a wire of any type": (load_vae(["any", 0]), "the input 'policy' is 'always' (str)"),
    "wrapped": (load_vae({"__value__": [1]}), "the input 'policy' is [1] (list)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_literal_in_place_of_a_wire(server, name):
    """Its prompt says what is wrong, and the next ones run."""
    prompt, words = WRONG[name]
    status = server.run(prompt)["status"]
    assert status["status_str"] == "error"
    (error,) = [said for kind, said in status["messages"] if kind == "execution_error"]
    assert words in error["exception_message"] and "Connect it to" in error["exception_message"]
    assert len(server.pictures(simple(f"after {list(WRONG).index(name)}"))) == 1


def test_an_errors_type_does_not_say_where_the_pack_lies(server):
    """ComfyUI names the modules of custom nodes by their folder's path."""
    status = server.run({"probe": node("SpillwayProbeModel", file="vae/damaged.safetensors")})["status"]
    (error,) = [said for kind, said in status["messages"] if kind == "execution_error"]
    assert error["exception_type"] == "spillway.SourceError" and "damaged.safetensors" in error["exception_message"]


HALF_NAMED = {
    "a VAE": {"x": node("SpillwayLoadVAE", vae_name="half.safetensors")},
    "a LoRA": {
        "load": node("SpillwayLoadCheckpoint", ckpt_name="sd15.safetensors"),
        "x": node("SpillwayLoraLoaderModelOnly", model=["load", 0], lora_name="half.safetensors", strength_model=1.0),
    },
    "ComfyUI's node": {"x": node("VAELoader", vae_name="half.safetensors")},
}


@pytest.mark.parametrize("what", HALF_NAMED)
def test_an_error_with_half_of_a_character_in_it(server, what):
    """ComfyUI writes it to its log, and what that raises would end the thread that runs prompts."""
    prompt = {**HALF_NAMED[what], "report": node("SpillwayMemoryReport", value=["x", 0])}
    status = server.run(prompt)["status"]
    assert status["status_str"] == "error"
    assert len(server.pictures(simple(f"after half of {what}"))) == 1
    assert "\\ud800" in server.said() or what != "a VAE"


def test_a_policy_node_that_leads_nowhere(server):
    """ComfyUI checks no input of a node that no output needs; the output cache reads the policies of all."""
    prompt = {**simple("policy"), "policy": node("SpillwayCachePolicy", value="x", headroom_gb=1e999, disk_gb={})}
    assert len(server.pictures(prompt)) == 1
    assert len(server.pictures(simple("after the policy"))) == 1


def settings_file(base, text):
    path = base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_variables_and_settings_that_make_no_sense(tmp_path):
    variables = {kind.name: "16GB" for kind in settings.VARIABLES}
    settings_file(tmp_path, json.dumps({kind.name: "absurd" for kind in settings.IN_COMFYUI}))
    with Server(tmp_path, **variables) as running:
        assert len(running.pictures(simple())) == 1
        assert len(running.pictures(simple("b"))) == 1
        for kind in (*settings.VARIABLES, *settings.IN_COMFYUI):
            value = "'16GB'" if kind in settings.VARIABLES else "'absurd'"
            shown = "not shown here" if getattr(kind, "secret", False) else value
            assert (
                running.said().count(f"{kind.name} is {shown}; expected {kind.expected}. It is {settings._else(kind)}.")
                == 1
            )


@pytest.mark.parametrize("text", ["{ damaged", "[" * 100_000, "[1]", '{"Spillway.Cache.DiskGB": NaN}'], ids=range(4))
def test_settings_files_that_cannot_be_read(monkeypatch, tmp_path, caplog, text):
    import folder_paths

    from spillway.cache.comfyui import settings as comfy_settings

    monkeypatch.setattr(settings, "_said", set())
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    settings_file(tmp_path, text)
    for _ in range(3):
        assert comfy_settings.disk_gigabytes() == 0.0 and comfy_settings.disk_seconds() == 10.0
        assert comfy_settings.cache_turned_off() is None
    assert len(caplog.records) == 1


def test_notes_of_unfinished_files_that_are_none(tmp_path):
    """The pack's nodes are there, prompts run, and what a kill did leave behind is removed at the start."""
    unfinished = tmp_path / "output" / ".spillway-0123456789abcdef.partial"
    noted = tmp_path / "output" / "checkpoints" / ".spillway-89abcdef01234567.partial"
    output = tmp_path / "user" / "__spillway" / "outputs" / ".spillway-fedcba9876543210.partial"
    notes = tmp_path / "user" / "spillway-unfinished"
    for path in (unfinished, noted, output):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    (notes / "folder").mkdir(parents=True)
    (notes / "loop").symlink_to("loop")
    os.mkfifo(notes / "pipe")
    for name, data in (
        ("binary", b"\xff\xfe\0"),
        ("overlong", b"/" + b"x" * 5000 + b"/.spillway-0.partial"),
        ("zz", os.fsencode(unfinished)),
        ("89abcdef01234567", os.fsencode(noted)),
    ):
        (notes / name).write_bytes(data)
    with Server(tmp_path) as running:
        assert set(os.listdir(notes)) == {"folder", "loop", "pipe"}
        for path in (unfinished, noted, output):
            assert not path.exists()
            assert f"removed {path}, which an earlier run left unfinished" in running.said()
        assert "SpillwayPolicy" in running.get("object_info")
        assert len(running.pictures(simple())) == 1


def test_a_file_in_place_of_the_folder_of_notes(tmp_path, checkpoint):
    """As where the user folder cannot be written to: the model is saved all the same."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "spillway-unfinished").write_bytes(b"")
    (tmp_path / "models" / "checkpoints").mkdir(parents=True)
    os.symlink(checkpoint("sd15"), tmp_path / "models" / "checkpoints" / "sd15.safetensors")
    with Server(tmp_path) as running:
        prompt = {
            "load": node("SpillwayLoadCheckpoint", ckpt_name="sd15.safetensors"),
            "save": node("SpillwaySaveDiffusionModel", model=["load", 0], filename_prefix="saved", dtype="as loaded"),
        }
        status = running.run(prompt)["status"]
        assert status["status_str"] == "success", json.dumps(status)
        assert (tmp_path / "output" / "saved_00001_.safetensors").is_file()
        assert "cannot be noted as unfinished" in running.said()
