"""'Manage every loader' from prompt to prompt, and the comparison with ComfyUI: what holds, and what is left behind."""

import threading
from types import SimpleNamespace

import execution
import nodes as comfyui_nodes
import pytest

from kit.comfyui.executor import NODES, RAN, Executor, node_class, prompt
from spillway.cache.comfyui import settings as settings_of_pack
from spillway.nodes import compare, manage
from spillway.nodes.routes import BadRequest, parse_compare
from spillway.patcher.comfyui.loading import managed


@pytest.fixture
def executor(monkeypatch):
    """An executor that heeds the setting, and has run a prompt of small nodes. ``executor.wants``: the setting."""
    monkeypatch.setattr(execution.PromptExecutor, "execute", execution.PromptExecutor.execute)
    monkeypatch.setattr(manage, "around", None)
    wants = SimpleNamespace(setting=False)
    monkeypatch.setattr(manage, "manages_loaders", lambda: wants.setting)
    for name, node in NODES.items():
        monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, name, node)
    manage.install()
    compare.install()
    made = Executor()
    made.wants, made.cache = wants, None  # outputs that are dropped would stay in the kit's cache
    yield made
    managed.turn_off()


def ran(executor, number, graph=None, **extra_data):
    RAN.clear()
    executor.real.execute(graph or prompt(), str(number), extra_data, ["save"])
    return [name for name, _ in RAN]


def test_a_change_of_the_setting_makes_no_use_of_models_of_the_other_kind(executor, caplog):
    caplog.set_level("INFO")
    assert "Load" in ran(executor, 1) and not managed.is_on()
    assert ran(executor, 2) == [], "all of it is cached"
    executor.wants.setting = True
    assert "Load" in ran(executor, 3) and managed.is_on()
    assert "cached outputs were dropped" in caplog.text
    assert ran(executor, 4) == []
    executor.wants.setting = False
    assert "Load" in ran(executor, 5) and not managed.is_on()


def test_models_that_a_pack_keeps_itself_are_named(executor, caplog):
    """Nobody but that pack can have them loaded the other way."""
    kept = NODES["Load"]().run()[0]
    assert "Load" in ran(executor, 1)
    executor.wants.setting = True
    ran(executor, 2)
    assert "Module stay as they were loaded, as another pack keeps them" in caplog.text
    del kept
    caplog.clear()
    executor.wants.setting = False
    ran(executor, 3)
    assert "another pack keeps" not in caplog.text


def test_a_prompt_may_ask_for_itself_alone(executor):
    seen = []
    graph = prompt()
    graph["load"]["class_type"] = "Seen"
    comfyui_nodes.NODE_CLASS_MAPPINGS["Seen"] = node_class("Seen", lambda **_: (seen.append(managed.is_on()), "clip"))
    graph["lora"]["class_type"] = "Encode"
    ran(executor, 1, graph, spillway_manage=True)
    assert not managed.is_on(), "it ends with the prompt"
    ran(executor, 2, graph)
    ran(executor, 3, graph, spillway_manage="yes")  # no answer to the question
    assert seen == [True, False]
    comfyui_nodes.NODE_CLASS_MAPPINGS.pop("Seen")


def test_the_variable_goes_before_the_setting(monkeypatch):
    monkeypatch.setattr(settings_of_pack, "setting", lambda kind: kind.name == "Spillway.Models.Manage")
    assert settings_of_pack.manages_loaders()
    monkeypatch.setenv("SPILLWAY_MANAGE", "0")
    assert not settings_of_pack.manages_loaders()
    monkeypatch.setattr(settings_of_pack, "setting", lambda kind: None)
    monkeypatch.setenv("SPILLWAY_MANAGE", "1")
    assert settings_of_pack.manages_loaders()


# --- the comparison ---------------------------------------------------------------------------------------------------


def queue(*numbers):
    """A server's queue with prompts of these ids."""
    found = SimpleNamespace(mutex=threading.RLock(), queue=[(0, number) for number in numbers], currently_running={})

    def delete_queue_item(wanted):
        found.queue[:] = [item for item in found.queue if not wanted(item)]

    found.delete_queue_item = delete_queue_item
    return found


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.setattr(compare, "_current", None)
    made = compare.Comparison(queue(), [])
    made.queue.queue[:] = [(0, run.prompt_id) for run in made.runs.values()]
    compare.begin(made)
    return made


def run_both(executor, comparison, graph):
    for number, made, extra_data in compare.prompts(comparison, dict.fromkeys(compare.KINDS, graph), "me"):
        item = next((item for item in comparison.queue.queue if item[1] == number), None)
        if item is not None:
            comparison.queue.queue.remove(item)
            executor.real.execute(made, number, extra_data, ["save"])


def test_both_runs_begin_from_nothing_and_leave_nothing(executor, comparison):
    ran(executor, 1)
    kinds = []
    graph = prompt()
    comfyui_nodes.NODE_CLASS_MAPPINGS["Seen"] = node_class(
        "Seen", lambda **_: (kinds.append(managed.is_on()), {"ui": {}, "result": (None,)})[1], True
    )
    graph["save"]["class_type"] = "Seen"
    RAN.clear()
    run_both(executor, comparison, graph)
    assert [name for name, _ in RAN].count("Load") == 2, "nothing was found, of other prompts or of the first run"
    comfyui_nodes.NODE_CLASS_MAPPINGS.pop("Seen")
    told = comparison.as_dict()
    assert kinds == [False, True]
    assert told["state"] == "done" and "nothing that could be compared" in told["text"]
    assert all(words in told["text"].splitlines()[-1] for words in ("Spillway", "ComfyUI", "torch", "RAM"))
    assert all(run["seconds"] > 0 and run["rss"] > 0 for run in told["runs"].values())
    assert not managed.is_on() and executor.real.success
    assert "Load" in ran(executor, 2)


def test_a_run_that_fails_ends_the_comparison_and_leaves_nothing_on(executor, comparison):
    def fail(**_):
        raise RuntimeError("on purpose")

    comfyui_nodes.NODE_CLASS_MAPPINGS["Fails"] = node_class("Fails", fail)
    graph = prompt()
    graph["image"]["class_type"] = "Fails"
    run_both(executor, comparison, graph)
    del comfyui_nodes.NODE_CLASS_MAPPINGS["Fails"]
    assert comparison.state == "failed: on purpose" and comparison.queue.queue == []
    assert comparison.runs["Spillway"].state == "waits", "it never ran"
    assert not managed.is_on() and "ComfyUI's run: failed: on purpose." in comparison.as_dict()["text"]


def test_a_run_that_was_taken_out_of_the_queue_ends_it(comparison):
    compare.look(comparison)
    assert comparison.state == "runs"
    comparison.queue.queue.clear()
    compare.look(comparison)
    assert comparison.state == "was taken out of the queue"


def test_no_picture_is_saved_among_the_users():
    given = {"9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "a"}}}
    assert compare.without_files(given)["9"] == {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}}
    assert given["9"]["class_type"] == "SaveImage"


GRAPH = {"1": {"class_type": "A", "inputs": {}}}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, '"prompt" is no object'),
        ({"prompt": GRAPH, "comfyui": {"1": {}}}, 'no "class_type" and "inputs"'),
        ({"prompt": GRAPH, "client_id": ""}, '"client_id" is no id'),
        ({"prompt": GRAPH, "often": 1}, "there is no often"),
    ],
)
def test_the_route_takes_two_workflows_and_nothing_else(asked, words):
    with pytest.raises(BadRequest, match=words):
        parse_compare(asked)


def test_without_a_second_workflow_both_runs_have_the_same():
    asked = parse_compare({"prompt": GRAPH, "client_id": "me"})
    assert asked.prompts == {"ComfyUI": GRAPH, "Spillway": GRAPH} and asked.client == "me"
    other = {"1": {"class_type": "B", "inputs": {}}}
    assert parse_compare({"prompt": GRAPH, "comfyui": other}).prompts["ComfyUI"] == other
