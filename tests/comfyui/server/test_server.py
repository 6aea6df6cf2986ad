"""A real ComfyUI server with the pack in its custom_nodes: prompts with the pack's nodes give ComfyUI's pictures."""

import copy
import json
import os
import socket
import time

import numpy as np
import pytest
import safetensors

from kit.comfyui.running_server import Server, node

FORMAT = "nvfp4"
FLUX = {"hidden": 128, "depth": 1, "depth_single": 1, "context": 768, "pooled": 768}  # as wide as CLIP-L


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    base = tmp_path_factory.mktemp("server")
    files = {
        "diffusion_models/flux": checkpoint("flux", **FLUX),
        "checkpoints/sd15": checkpoint("sd15"),
        "text_encoders/clip": checkpoint("clip_l"),
        "vae/flux": checkpoint("flux_vae"),
        "upscale_models/small": checkpoint("compact"),
    }
    for name, path in files.items():
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path, base / "models" / f"{name}.safetensors")
    with Server(base) as running:
        yield running


def picture(prompt, name, model, positive, negative, latent, vae, cfg):
    """Sampler, decoder and output `name`, on what other nodes gave."""
    prompt[f"{name} sampler"] = node(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=3,
        steps=2,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    prompt[f"{name} image"] = node("VAEDecode", samples=[f"{name} sampler", 0], vae=vae)
    prompt[name] = node("SaveImage", images=[f"{name} image", 0], filename_prefix=name)


def graph(loaders):
    """A Flux with text encoder and VAE from files of their own, and a checkpoint; `loaders` are the nodes that load
    them.
    """
    prompt = copy.deepcopy(loaders)
    for name, clip in (("flux", ["clip", 0]), ("sd15", ["checkpoint", 1])):
        prompt[f"{name} positive"] = node("CLIPTextEncode", clip=clip, text="a red house by the sea")
        prompt[f"{name} negative"] = node("CLIPTextEncode", clip=clip, text="")
    prompt["flux latent"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    prompt["sd15 latent"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    for name, model, vae, cfg in (
        ("flux", ["model", 0], ["vae", 0], 1.0),
        ("sd15", ["checkpoint", 0], ["checkpoint", 2], 5.0),
    ):
        picture(prompt, name, model, [f"{name} positive", 0], [f"{name} negative", 0], [f"{name} latent", 0], vae, cfg)
    return prompt


THEIRS = {
    "model": node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default"),
    "clip": node("CLIPLoader", clip_name="clip.safetensors", type="stable_diffusion"),
    "vae": node("VAELoader", vae_name="flux.safetensors"),
    "checkpoint": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors"),
}
POLICY = node("SpillwayPolicy", vram_gb=0.01, headroom_gb=-1.0, pinned_gb=-1.0, keep="auto", priority=0)
OURS = {
    "policy": POLICY,
    "model": node(
        "SpillwayLoadDiffusionModel", unet_name="flux.safetensors", weight_dtype="default", policy=["policy", 1]
    ),
    "clip": node("SpillwayLoadCLIP", clip_name1="clip.safetensors", type="stable_diffusion", policy=["policy", 1]),
    "vae": node("SpillwayLoadVAE", vae_name="flux.safetensors", policy=["policy", 1]),
    "checkpoint": node("SpillwayLoadCheckpoint", ckpt_name="sd15.safetensors", policy=["policy", 1]),
}


def test_the_server_knows_our_nodes(server):
    known = server.get("object_info")
    ours = {name: info for name, info in known.items() if name.startswith("Spillway")}
    assert set(ours) >= {
        "SpillwayLoadDiffusionModel",
        "SpillwayLoadCheckpoint",
        "SpillwayMakeDynamic",
        "SpillwayPolicy",
    }
    assert ours["SpillwayLoadDiffusionModel"]["input"]["required"]["unet_name"]
    assert all(info["category"] == "spillway" for info in ours.values())
    assert "IMPORT FAILED" not in server.said()


def ran_as(server, prompt, managed):
    """Run a prompt that asks whether every loader is managed. Returns its pictures and what the log said meanwhile."""
    before = len(server.said())
    asked = {"prompt": prompt, "extra_data": {"spillway_manage": managed}}
    number = server.get("prompt", asked)["prompt_id"]
    history = server.wait(lambda: server.get(f"history/{number}").get(number), 240)
    assert history["status"]["status_str"] == "success", server.said()
    return server.pictures_of(history), server.said()[before:]


def test_comfyuis_loaders_give_the_same_pictures_with_every_loader_managed(server):
    prompt = graph(THEIRS)
    prompt["upscaler"] = node("UpscaleModelLoader", model_name="small.safetensors")
    prompt["upscaled"] = node("ImageUpscaleWithModel", upscale_model=["upscaler", 0], image=["flux image", 0])
    prompt["larger"] = node("SaveImage", images=["upscaled", 0], filename_prefix="larger")
    wanted, said = ran_as(server, prompt, False)
    assert "bundles" not in said
    got, said = ran_as(server, prompt, True)
    assert set(got) == {"flux", "sd15", "larger"}
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert all(f"{name}: all " in said for name in ("Flux", "AutoencodingEngine", "SRVGGNetCompact"))
    assert "left to ComfyUI" not in said and "manage every loader: off" in said and "another pack keeps" not in said


def test_a_graph_is_compared_with_comfyui_and_nothing_stays(server):
    before = sorted(os.listdir(server.base / "output")) if (server.base / "output").exists() else []
    told = server.get("spillway/compare", {"prompt": graph(OURS), "comfyui": graph(THEIRS)})
    assert told["state"] == "runs"
    status, body = server.ask("spillway/compare", json.dumps({"prompt": graph(OURS)}).encode())
    assert status == 429 and b"another comparison" in body
    done = server.wait(lambda: (found := server.get("spillway/compare"))["state"] != "runs" and found, 240)
    assert done["state"] == "done", (done, server.said())
    assert done["shown"]["pictures"] == {"count": 2, "frames": 2, "equal": 2, "most": 0, "other": 0}
    assert all(words in done["text"] for words in ("2 of 2 are equal, pixel by pixel", "seconds", "most RAM"))
    after = sorted(os.listdir(server.base / "output")) if (server.base / "output").exists() else []
    assert after == before
    server.wait(lambda: server.get("queue") == {"queue_running": [], "queue_pending": []}, 30)


def test_a_comparison_that_is_interrupted_leaves_nothing_behind(server):
    long = graph(THEIRS)
    long["flux sampler"]["inputs"]["steps"] = 2000
    server.get("spillway/compare", {"prompt": long})
    server.wait(lambda: server.get("spillway/memory")["run"]["running"], 60)
    server.wait(lambda: (server.get("spillway/memory")["run"]["running"] or {}).get("kind") == "KSampler", 60)
    server.get("interrupt", {})
    done = server.wait(lambda: (found := server.get("spillway/compare"))["state"] != "runs" and found, 60)
    assert done["state"] == "was interrupted" and "run: was interrupted." in done["text"]
    server.wait(lambda: server.get("queue") == {"queue_running": [], "queue_pending": []}, 30)
    said = server.said()
    assert said.count("manage every loader: on") == said.count("manage every loader: off")


def test_a_workflow_that_cannot_run_is_refused_before_it_is_compared(server):
    wrong = graph(THEIRS)
    wrong["vae"]["inputs"]["vae_name"] = "none.safetensors"
    status, body = server.ask("spillway/compare", json.dumps({"prompt": wrong}).encode())
    assert status == 400 and b"cannot run" in body
    assert server.get("queue") == {"queue_running": [], "queue_pending": []}


def test_our_loaders_and_make_dynamic_give_comfyuis_pictures(server):
    """The pack's loaders; then its Make Dynamic behind ComfyUI's loaders: all give ComfyUI's pictures."""
    wanted = server.pictures(graph(THEIRS))
    assert set(wanted) == {"flux", "sd15"} and all(image.std() > 1 for image in wanted.values())
    ours = server.pictures(graph(OURS))

    made = graph(THEIRS)
    made["policy"] = POLICY
    made["dynamic"] = node(
        "SpillwayMakeDynamic",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        vae=["checkpoint", 2],
        policy=["policy", 1],
    )
    made["sd15 sampler"]["inputs"]["model"] = ["dynamic", 0]
    made["sd15 image"]["inputs"]["vae"] = ["dynamic", 2]
    for name in ("sd15 positive", "sd15 negative"):
        made[name]["inputs"]["clip"] = ["dynamic", 1]
    made = server.pictures(made)
    for got in (ours, made):
        for name, image in wanted.items():
            assert np.array_equal(got[name], image), f"{name}: {(got[name] != image).mean():.1%} of the numbers differ"
    assert "[Spillway]" in server.said()


def test_an_error_stops_its_own_prompt_only(server):
    """A node's error reaches the one who asked, and the next prompt runs."""
    prompt = graph(OURS)
    prompt["policy"] = node("SpillwayPolicy", vram_gb=-0.5, headroom_gb=-1.0, pinned_gb=-1.0, keep="auto", priority=0)
    status = server.run(prompt)["status"]
    assert status["status_str"] == "error"
    assert "vram_gb is -0.5; give 0 or more GB" in json.dumps(status)
    assert server.pictures(graph(OURS))


def test_a_saved_file_has_the_workflow_and_is_listed(server):
    """The save node under the executor: the workflow is in the file, the report in the history; ComfyUI lists it."""
    prompt = {
        "model": OURS["model"],
        "policy": POLICY,
        "save": node(
            "SpillwaySaveDiffusionModel",
            model=["model", 0],
            filename_prefix="diffusion_models/saved",
            dtype="as loaded",
        ),
    }
    history = server.run(prompt)
    assert history["status"]["status_str"] == "success", json.dumps(history["status"], indent=1) + server.said()
    path = server.base / "output" / "diffusion_models" / "saved_00001_.safetensors"
    assert history["outputs"]["save"]["text"][0].startswith(f"{path.name}: {path.stat().st_size:,} bytes in ")
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["prompt"]) == prompt
    (names,) = server.get("object_info/SpillwayLoadDiffusionModel").values()
    assert path.name in names["input"]["required"]["unet_name"][1]["options"]


def test_quantised_models_give_the_pictures_that_comfyui_makes_of_their_files(server):
    """Quantised by the loaders, by Quantise Model, and saved: those files are loaded by ComfyUI's own nodes."""
    loaders = copy.deepcopy(OURS)
    for name in ("model", "clip", "checkpoint"):
        loaders[name]["inputs"]["weight_dtype"] = FORMAT
    wanted, plain = server.pictures(graph(loaders)), server.pictures(graph(THEIRS))
    assert all(not np.array_equal(wanted[name], plain[name]) and wanted[name].std() > 1 for name in plain)

    settings = {"weight_dtype": FORMAT, "clip_dtype": FORMAT, "leave_out": ""}
    made = graph(THEIRS)
    made["flux quantised"] = node("SpillwayQuantiseModel", model=["model", 0], clip=["clip", 0], **settings)
    made["sd15 quantised"] = node("SpillwayQuantiseModel", model=["checkpoint", 0], **settings)
    for name in ("flux", "sd15"):
        made[f"{name} sampler"]["inputs"]["model"] = [f"{name} quantised", 0]
    for name in ("flux positive", "flux negative"):
        made[name]["inputs"]["clip"] = ["flux quantised", 1]
    parts = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
    made["save model"] = node(
        "SpillwaySaveDiffusionModel", model=["model", 0], filename_prefix="diffusion_models/four", dtype=FORMAT
    )
    made["save checkpoint"] = node("SpillwaySaveCheckpoint", **parts, filename_prefix="checkpoints/four", dtype=FORMAT)
    by_node = server.pictures(made)

    files = graph(THEIRS)
    files["model"]["inputs"]["unet_name"] = files["checkpoint"]["inputs"]["ckpt_name"] = "four_00001_.safetensors"
    files["flux quantised"] = node("SpillwayQuantiseModel", clip=["clip", 0], **settings)
    for name in ("flux positive", "flux negative"):
        files[name]["inputs"]["clip"] = ["flux quantised", 1]
    of_files = server.pictures(files)
    for got in (by_node, of_files):
        for name, image in wanted.items():
            assert np.array_equal(got[name], image), f"{name}: {(got[name] != image).mean():.1%} of the numbers differ"
    assert f"quantised to {FORMAT}" in server.said()


# --- routes -----------------------------------------------------------------------------------------------------------


def status_of(server, body, **headers):
    """(status, answer) of a POST to /spillway/free."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = server.ask("spillway/free", data, **headers)
    return status, json.loads(answer) if status == 200 else answer.decode()


def test_memory_is_told_and_freed(server):
    """The report has the models and the cache; freeing empties both, and the next prompt makes the same picture."""
    wanted = server.pictures(graph(OURS))
    report = server.get("spillway/memory")
    assert "Spillway" in {model["by"] for model in report["models"]}
    assert report["cache"]["entries"] > 5 and report["cache"]["largest"] and report["memory"]["rss"] > 100 << 20
    status, answer = status_of(server, {"cache": True, "models": True, "pins": True})
    assert status == 200 and answer["put_off"] == [] and answer["cache_bytes"] > 0 and answer["words"]
    report = server.get("spillway/memory")
    assert report["cache"]["entries"] == 0
    ours = [model for model in report["models"] if model["by"] == "Spillway"]
    assert all(model["bytes"]["ram"] == model["bytes"]["pins"] == 0 for model in ours)
    again = server.pictures(graph(OURS))
    assert all(np.array_equal(again[name], image) for name, image in wanted.items())


def test_a_cap_over_all_models_is_set_while_the_server_runs(server):
    """As the settings' page sets it. It holds from the next prompt on, and until it is set back."""
    prompt = graph({**OURS, "policy": node("SpillwayPolicy", **{**POLICY["inputs"], "vram_gb": -1.0})})
    prompt = {name: part for name, part in prompt.items() if not name.startswith(("sd15", "checkpoint"))}

    def held(gigabytes):
        server.get("settings/Spillway.Models.DeviceGB", gigabytes)
        assert status_of(server, {"cache": True, "models": True})[0] == 200
        images = server.pictures(prompt)
        models = [model for model in server.get("spillway/memory")["models"] if model["by"] == "Spillway"]
        return images, sum(model["bytes"]["ram"] for model in models), str(models)

    (wanted, without, _), (images, within, words), (_, afterwards, _) = held(0), held(0.02), held(0)
    assert 0 < within <= 0.02 * (1 << 30) < without == afterwards
    assert "20.5 MiB for all models together" in words
    assert all(np.array_equal(images[name], image) for name, image in wanted.items())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{ not json", "no JSON"),
        (b"[" * 4000, "no JSON"),
        (b"[1]", "no JSON object"),
        ({}, "nothing is to be freed"),
        ({"cache": 1}, "neither true nor false"),
        ({"cache": True, "bytes": -1}, "whole number"),
        ({"cache": True, "bytes": 1e9}, "whole number"),
        ({"everything": True}, "no everything"),
        (b'{"cache": true, "pad": "' + b"x" * 5000 + b'"}', "larger than 4096"),
    ],
)
def test_what_cannot_be_freed_says_why(server, body, words):
    status, answer = status_of(server, body)
    assert status == 400 and words in answer


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("pause", [None, 0.3])
def test_a_body_in_another_encoding_than_it_says_is_refused(server, encoding, pause):
    """Whether the body comes with its headers or after them, when aiohttp tells nobody what it cannot inflate."""
    assert answer_to(server, b'{"cache": true}', pause, Content_Encoding=encoding).split()[1] in (b"400", b"408")


def test_a_body_that_never_comes_is_not_waited_for(server):
    answer = answer_to(server, b'{"cache":', 0.1, Content_Length=100)
    assert answer.split()[1] == b"408" and b"nothing more of the body came for 10 s" in answer
    assert status_of(server, {"cache": True})[0] == 200


def answer_to(server, body, pause, **headers):
    """What the server answers, within half a minute, to a body that follows its headers after so many seconds."""
    sent = {"Host": "here", "Content-Type": "application/json", "Content-Length": len(body), "Connection": "close"}
    sent |= {name.replace("_", "-"): headers[name] for name in headers}
    lines = ["POST /spillway/free HTTP/1.1", *(f"{name}: {sent[name]}" for name in sent), "", ""]
    head = "\r\n".join(lines).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head if pause else head + body)
        if pause:
            time.sleep(pause)
            connection.sendall(body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("model", {"model": 1 << 40, "action": "free_vram"}, 404, "no model"),
        ("model", {"model": 1, "action": "format"}, 400, "is none of"),
        ("model", b'{"pad": "' + b"x" * 5000 + b'"}', 400, "larger than 4096"),
        ("look", {"client_id": "nobody", "looks": True}, 400, "no websocket"),
        ("look", {"client_id": "x" * 200, "looks": True}, 400, "is no id"),
        ("look", {"client_id": "nobody", "looks": "yes"}, 400, "neither true nor false"),
        ("look", {"client_id": "nobody", "looks": False}, 200, "looking"),
    ],
)
def test_the_panels_routes_say_why_not(server, path, body, status, words):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    got, answer = server.ask(f"spillway/{path}", data)
    assert got == status and words in answer.decode()
    assert server.ask(f"spillway/{path}", data, Sec_Fetch_Site="cross-site")[0] == 403


def test_other_sites_and_other_types_may_not_free(server):
    everything = {"cache": True}
    assert status_of(server, everything, Content_Type="text/plain")[0] == 400
    assert status_of(server, everything, Sec_Fetch_Site="cross-site")[0] == 403
    assert status_of(server, everything, Origin="http://elsewhere.example")[0] == 403
    assert status_of(server, everything, Origin=f"http://127.0.0.1:{server.port}")[0] == 200
