"""What the pages name runs on a real server: every example workflow, and every route with the body that stands there.

The server has narrow files of the names that the workflows ask for. They run in short, with few steps and a small
picture. Some also run as they are, slow ones with `--slow` alone.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors

from kit.comfyui.example_workflows import ALL, SMALL, in_short, lay_out, nodes_of, prompt_of
from kit.comfyui.running_server import Server, node
from kit.docs import HELP, PAGES
from kit.page_commands import WORKFLOW, commands_of
from kit.range_server import RangeServer

PICTURES = {
    "flux_style_reference": {(1024, 1024)},
    "sd15_seamless_controlnet": {(512, 512), (1024, 1024)},  # the narrow upscale model doubles
}
TEXTS = {
    "scan_models": ("controlnet/control_v11p_sd15_canny_fp16.safetensors", "flux1-dev.safetensors"),
    "convert_pickle": ("v1-5-pruned-emaonly.safetensors", "tensors"),
    "audio_encoder": ("encoded_audio",),
}
SAVED = {"merge_blocks": 3}
SLOW = {"flux_style_reference", "sd15_seamless_controlnet"}  # 20 steps and a whole VAE: minutes
AS_THEY_ARE = [*PICTURES, *TEXTS, *SAVED]
# What each leaves in short: (width of a picture) or (end of a file's name), once for each.
LEAVES = {
    "flux_dev_save_fp8": ["safetensors"],
    "flux_merge_and_save": ["safetensors"],
    "sd15_extract_lora": ["safetensors"],
    "sd15_save_checkpoint": ["safetensors"],
    "sd15_seamless_controlnet": [SMALL, 2 * SMALL],
    "sd15_memory": [SMALL * 3 // 2, 1024],  # the second is the report's
    **{name: [] for name in ("flux_dev_probe", "self_test")},
}
# What the log says of what a workflow is there to show, and would lack where it ran without that.
LOGGED = {
    "flux_dev_compile": "compiled DoubleStreamBlock",
    "flux_dev_lora_stack": "weights patched",
    "flux_dev_policy": "set by the policy",
    "sd15_lora": "weights patched",
}
FROM_ELSEWHERE = "remote_model_file"

ROUTE = re.compile(r"`(GET|POST) (/spillway/[a-z]+)`(?:[^`|]*? with\s`(\{[^`]*\})`)?")
# What an answer to each must have: of the report the parts that the pages name, and `coming`.
ANSWERS = {
    "GET /spillway/memory": {"memory", "models", "run", "cache", "coming"},
    "POST /spillway/free": {"cache_bytes", "put_off", "words"},
    "POST /spillway/model": {"freed", "put_off"},
    "POST /spillway/forecast": {"samplers", "uses"},
    "POST /spillway/compare": {"state"},
    "GET /spillway/compare": {"state"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory, checkpoint):
    base = tmp_path_factory.mktemp("examples")
    lay_out(base, ALL, checkpoint)
    # The attention that ComfyUI takes on a CPU by itself takes minutes for pictures of this size.
    with Server(base, ["--use-pytorch-cross-attention"]) as running:
        yield running


def kept(server, name, history):
    """Copy the pictures to where SPILLWAY_SHOTS says, for somebody to look at."""
    folder = os.environ.get("SPILLWAY_SHOTS")
    for output in history["outputs"].values():
        for place, image in enumerate(output.get("images", []) if folder else []):
            Path(folder).mkdir(parents=True, exist_ok=True)
            source = server.base / "output" / image["subfolder"] / image["filename"]
            shutil.copy(source, Path(folder) / f"{name}-{place}-{image['filename']}")


def seams(picture):
    """How far its opposite edges are apart, beside rows or columns that are neighbours: 1 where there is no seam."""
    numbers = picture.astype(float)
    apart = [np.abs(numbers.take(0, axis) - numbers.take(-1, axis)).mean() for axis in (0, 1)]
    near = [np.abs(np.diff(numbers, axis=axis)).mean() for axis in (0, 1)]
    return max(one / other for one, other in zip(apart, near, strict=True))


@pytest.fixture(scope="module")
def elsewhere(server):
    """The address of a file that is on no disk of the server's."""
    (found,) = (server.base / "models" / "checkpoints").glob("v1-5-pruned-emaonly-fp16.safetensors")
    web = RangeServer(found.parent)
    threading.Thread(target=web.serve, daemon=True).start()
    yield web.address(found.name)
    web.stop()


@pytest.mark.parametrize("name", [name for name in ALL if name not in AS_THEY_ARE or name in SLOW])
def test_a_workflow_runs_in_short(name, server, request):
    prompt = in_short(prompt_of(name, server))
    if name == FROM_ELSEWHERE:
        (file,) = (one["inputs"] for one in prompt.values() if one["class_type"] == "SpillwayRemoteModelFile")
        file |= {"address": request.getfixturevalue("elsewhere"), "name": "from_elsewhere.safetensors"}
    before, logged = set(server.base.rglob("*.safetensors")), len(server.said())
    history = server.run(prompt, 600)
    kept(server, name, history)
    assert history["status"]["status_str"] == "success", server.said()
    pictures = server.pictures_of(history).values()
    saved = sorted(path.suffix[1:] for path in set((server.base / "output").rglob("*.safetensors")) - before)
    assert sorted(picture.shape[1] for picture in pictures) + saved == LEAVES.get(name, [SMALL])
    assert all(picture.std() > 1 for picture in pictures), "no picture of one colour"
    assert LOGGED.get(name, "") in server.said()[logged:]
    assert [one for one in prompt.values() if one["class_type"].startswith("Spillway")], "a workflow of this pack"


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW)) for one in AS_THEY_ARE])
def test_a_workflow_runs_as_it_is(name, server):
    history = server.run(prompt_of(name, server), 2400)
    kept(server, name, history)
    assert history["status"]["status_str"] == "success", server.said()
    pictures = list(server.pictures_of(history).values())
    assert {picture.shape[:2] for picture in pictures} == PICTURES.get(name, set())
    for picture in pictures:
        assert picture.std() > 5, "no picture of one colour"
        assert (np.abs(np.diff(picture.astype(int), axis=0)) > 0).mean() > 0.1
    if name == "sd15_seamless_controlnet":
        (tile,) = (picture for picture in pictures if picture.shape[0] == 512)
        assert seams(tile) < 1.5 < seams(tile[:-7, :-7]), "its edges are neighbours, and others of it are not"
    told = "\n".join(text for output in history["outputs"].values() for text in output.get("text", []))
    assert all(words in told for words in TEXTS.get(name, ())), told
    if name in SAVED:
        files = sorted((server.base / "output" / "diffusion_models").glob("Spillway*.safetensors"))
        assert len(files) == SAVED[name]
        for file in files:
            with safetensors.safe_open(file, "pt") as opened:
                assert len(list(opened.keys())) > 50


def stacked(names, server):
    """The history of a picture with LoRAs at inputs of these names, of which the first has all of the strength."""
    prompt = prompt_of("sd15_seamless_controlnet", server)
    by_type = {one["class_type"]: (number, one["inputs"]) for number, one in prompt.items()}
    checkpoint, chosen = by_type["SpillwayLoadCheckpoint"][0], by_type["SpillwayLora"][1]
    stack, inputs = by_type["SpillwayGrowingLoraStack"]
    sampler = by_type["KSampler"][1]
    for name in [name for name in inputs if name.startswith("loras.")]:
        inputs.pop(name)
    for place, name in enumerate(names):
        strengths = {"strength_model": float(place == 0), "strength_clip": 0.0}
        prompt[f"lora {name}"] = node("SpillwayLora", **{**chosen, **strengths})
        inputs[name] = [f"lora {name}", 0]
    ends = {"positive": ["text", 0], "negative": ["text", 0], "latent_image": ["empty", 0]}
    sampler |= {"model": [stack, 0], "steps": 1, **ends}
    kept = {number: prompt[number] for number in (checkpoint, stack, *(f"lora {name}" for name in names))}
    kept[checkpoint]["inputs"].pop("policy", None)
    kept |= {
        "text": node("CLIPTextEncode", clip=[stack, 1], text="leaves"),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "sampler": node("KSampler", **sampler),
        "picture": node("VAEDecode", samples=["sampler", 0], vae=[checkpoint, 2]),
        "end": node("SaveImage", images=["picture", 0], filename_prefix="stack"),
    }
    return kept


def test_a_stack_of_no_loras_of_many_and_of_some_with_gaps(server):
    """Through the server's own check of prompts, which knows inputs that grow by their names."""
    first = ["loras.lora0"]
    many = [f"loras.lora{place}" for place in range(50)]
    pictures = {}
    for label, names in {"none": [], "one": first, "gap": ["loras.lora7"], "many": many}.items():
        ((_, pictures[label]),) = server.pictures(stacked(names, server)).items()
    assert (pictures["one"] == pictures["many"]).all() and (pictures["one"] == pictures["gap"]).all()
    assert (pictures["one"] != pictures["none"]).any()
    # One more than there can be: left out or refused, and the server goes on.
    code, _ = server.ask("prompt", json.dumps({"prompt": stacked([*first, "loras.lora50"], server)}).encode())
    assert code in (200, 400)
    server.wait(lambda: not server.get("queue")["queue_running"] and not server.get("queue")["queue_pending"], 120)
    ((_, again),) = server.pictures(stacked(["loras.lora0"], server)).items()
    assert (again == pictures["one"]).all()


# --- graphs in words --------------------------------------------------------------------------------------------------

CHAIN = re.compile(r"^[^\n.]*→(?:[^\n.]|\.(?=[\w*]))*", re.MULTILINE)


def chain_of(page, known):
    """The steps of the graph that a help page puts in words: of each the kinds of nodes that it may be."""
    (words,) = CHAIN.findall(page.read_text(encoding="utf-8"))
    steps = []
    for step in words.split("→"):
        names = re.findall(r"`([^`]+)`", step) + ["KSampler"] * ("sampler" in step)
        found = [[kind for kind, shown in known.items() if is_called(shown, name)] for name in names]
        found = [kinds for kinds in found if kinds] + [[page.stem]] * ("this node" in step)
        assert found or "loaders" in step, f"no node is called {names}"
        steps.append(found)
    return [step for step in steps if step]


def is_called(shown, name):
    """Whether a text means a node. ComfyUI says more of some: Load LoRA (Model and CLIP), CLIP Text Encode (Prompt)."""
    return shown == name or (shown.startswith(f"{name} (") and not shown.endswith("(Spillway)"))


def behind(prompt, number):
    """The numbers of the nodes that get something of a node, through others too."""
    found = {number}
    for _ in prompt:
        found |= {one for one, node in prompt.items() for link in node["inputs"].values() if links(link, found)}
    return found - {number}


def links(value, numbers):
    return isinstance(value, list) and len(value) == 2 and value[0] in numbers


def follows(prompt, steps):
    """Whether nodes of a prompt follow each other as the steps say."""
    of_kind = [[[n for n, one in prompt.items() if one["class_type"] in kinds] for kinds in step] for step in steps]
    if not all(kinds for step in of_kind for kinds in step):
        return False
    pairs = [(a, b) for before, after in itertools.pairwise(of_kind) for a in before for b in after]
    return all(any(set(after) & behind(prompt, number) for number in before) for before, after in pairs)


IN_WORDS = [page for page in HELP if page.parent.name == "docs" and CHAIN.search(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", IN_WORDS, ids=lambda page: page.stem)
def test_a_graph_in_words_is_one_that_runs(page, server):
    known = {kind: one["display_name"] or kind for kind, one in nodes_of(server).items()}
    steps = chain_of(page, known)
    named = set(WORKFLOW.findall(page.read_text(encoding="utf-8"))) & set(ALL)
    prompts = [prompt_of(name, server) for name in sorted(named)]
    if any(follows(prompt, steps) for prompt in prompts):
        return  # that workflow ran above
    assert steps[1:] == [[["PreviewAny"]]], "no workflow that the page names is so"
    ((number, _),) = prompts[0].items()  # a node alone, which is looked at here as the page says
    history = server.run({**prompts[0], "look": node("PreviewAny", source=[number, 0])})
    assert history["status"]["status_str"] == "success" and history["outputs"]["look"]["text"][0]


def test_nodes_in_an_order_that_no_workflow_has_are_found(server):
    prompt = prompt_of("sd15_lora", server)
    loader, lora, sampler = ([[kind]] for kind in ("SpillwayLoadCheckpoint", "SpillwayLoraLoader", "KSampler"))
    assert follows(prompt, [loader, lora, sampler])
    assert not follows(prompt, [lora, loader, sampler]) and not follows(prompt, [loader, [["SpillwayLoraStack"]]])


# --- routes -----------------------------------------------------------------------------------------------------------


def routes_of(text):
    return {(f"{method} {route}", body) for method, route, body in ROUTE.findall(" ".join(text.split()))}


ASKED = sorted({asked for page in (*PAGES, *HELP) for asked in routes_of(page.read_text(encoding="utf-8"))})


def test_each_route_of_the_pages_is_known_with_its_body():
    assert {route for route, _ in ASKED} == set(ANSWERS)
    bodies = {route for route, body in ASKED if body}
    assert bodies == {route for route in ANSWERS if route.startswith("POST")}, "a page has to say what is sent"


@pytest.mark.parametrize(("route", "body"), [asked for asked in ASKED if asked[1] or asked[0].startswith("GET")])
def test_a_route_answers_as_its_page_says(route, body, server):
    path = route.split()[1].strip("/")
    # A comparison loads all anew, twice. test_server.py compares pictures, and here a graph without files is enough.
    prompt = in_short(prompt_of("self_test" if "compare" in path else "sd15_load_checkpoint", server))
    server.pictures(prompt)
    sent = json.loads(body.replace("...", json.dumps(prompt))) if body else None
    if path == "spillway/model":  # the number on the page stands for one of the report's
        sent["model"] = server.get("spillway/memory")["models"][0]["id"]
    told = server.get(path, sent)
    assert ANSWERS[route] <= set(told), told
    if path == "spillway/memory":
        assert told["memory"]["devices"] is not None and told["models"] and told["run"]
    if route == "POST /spillway/free":
        assert told["cache_bytes"] > 0 and not told["put_off"] and "RAM" in told["words"]
    if route == "POST /spillway/forecast":
        assert [one["kind"] for one in told["samplers"]] == ["KSampler"]
    if route == "POST /spillway/compare":
        server.wait(lambda: server.get(path)["state"] != "runs", 240)
        assert server.get(path)["state"] == "done", told


CURL = sorted(
    {one for page in PAGES for one in commands_of(page.read_text(encoding="utf-8")) if one.startswith("curl ")}
)


@pytest.mark.parametrize("command", CURL)
def test_curl_asks_as_the_page_says(command, server):
    asked = shlex.split(command.replace(":8188/", f":{server.port}/"))
    if shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    done = subprocess.run([*asked, "-s", "-f"], capture_output=True, timeout=120)
    assert done.returncode == 0 and json.loads(done.stdout)["words"], done.stderr
