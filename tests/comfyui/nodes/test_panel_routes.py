"""The panel's routes: what one model is told to do, who looks, and what a run's record says."""

import asyncio
import json
import threading
from types import SimpleNamespace

import execution
import nodes as comfyui_nodes
import pytest
import torch

from kit.comfyui import sampling
from kit.comfyui.dynamic_vram import software
from kit.comfyui.executor import NODES, RAN, Executor, prompt
from spillway.nodes import model_actions, watchers
from spillway.nodes.memory_report import memory_report
from spillway.nodes.model_actions import Action, act
from spillway.nodes.watchers import Watchers
from spillway.patcher.comfyui import run_record
from spillway.patcher.comfyui.loading.load import load_diffusion_model
from spillway.patcher.policy import Policy

MIB = 1 << 20
# Less than the model, and room for some of its weights beside what transfers take in fp32.
ROOM = 3 * MIB // 2
FORMATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def queue(running=False):
    return SimpleNamespace(mutex=threading.Lock(), currently_running={1: None} if running else {})


@pytest.fixture
def model(flux):
    model = load_diffusion_model(flux)
    sampling.sample(model, steps=2)
    return model


def record_of(model):
    number = model.dynamic.ledger.number
    return next(record for record in json.loads(json.dumps(memory_report()))["models"] if record.get("id") == number)


def do(model, name, value=None, running=False):
    return act(queue(running), Action(model.dynamic.ledger.number, name, value))


# --- actions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, '"model" is no whole number'),
        ({"model": True, "action": "keep", "value": True}, '"model" is no whole number'),
        ({"model": 1, "action": "destroy"}, '"action" is none of'),
        ({"model": 1, "action": ["keep"]}, '"action" is none of'),
        ({"model": 1, "action": "keep"}, "neither true nor false"),
        ({"model": 1, "action": "limit", "value": -1}, "neither a whole number of bytes nor null"),
        ({"model": 1, "action": "limit", "value": 1e9}, "neither a whole number of bytes nor null"),
        ({"model": 1, "action": "limit", "value": True}, "neither a whole number of bytes nor null"),
        ({"model": 1, "action": "limit", "value": 1 << 62}, "neither a whole number of bytes nor null"),
        ({"model": 1, "action": "free_vram", "force": True}, "no force to give"),
    ],
)
def test_what_cannot_be_done_says_why(asked, words):
    with pytest.raises(ValueError, match=words):
        Action.read(asked)


def test_a_model_that_is_gone_is_none():
    assert act(queue(), Action(1 << 40, model_actions.FREE_VRAM)) is None


def test_weights_go_and_come_back(model):
    dynamic = model.dynamic
    wanted = sampling.sample(model, steps=2)
    assert dynamic.resident_bytes > MIB
    done = do(model, model_actions.FREE_VRAM)
    assert dynamic.resident_bytes == 0 and done["freed"]["device"] > MIB and done["put_off"] == []
    assert record_of(model)["places"].count("r") == 0
    assert sampling.sample(model, steps=2).equal(wanted)
    do(model, model_actions.DROP_RAM)
    assert dynamic.device_bytes == dynamic.pinned_bytes == 0 and dynamic.residency is None
    assert sampling.sample(model, steps=2).equal(wanted)


@software
def test_a_limit_and_keep_hold_over_what_nodes_say_until_they_are_given_back(model):
    model.set_policy(Policy(vram_bytes=2 * MIB, keep="free after use"))
    sampling.sample(model, steps=1)
    assert record_of(model)["limit"] == 2 * MIB
    assert do(model, model_actions.LIMIT, ROOM)["put_off"] == []
    assert do(model, model_actions.KEEP, True)["put_off"] == []
    assert (record_of(model)["limit"], record_of(model)["keep"]) == (ROOM, "always")
    sampling.sample(model, steps=2)
    assert (model.dynamic.policy.vram_bytes, model.dynamic.policy.keep) == (ROOM, "always")
    assert 0 < model.dynamic.resident_bytes <= ROOM, "a model that is kept is not released after its use"
    assert model.clone().policy.vram_bytes == ROOM
    do(model, model_actions.LIMIT)
    assert model.dynamic.policy.vram_bytes == 2 * MIB, "what the node says holds again, at once"
    do(model, model_actions.KEEP, False)
    assert record_of(model)["chosen"] == ["keep"] and model.dynamic.policy.keep == "auto"


@software
def test_a_limit_takes_the_place_of_a_share(model):
    model.set_policy(Policy(vram_share=0.5))
    sampling.sample(model, steps=1)
    do(model, model_actions.LIMIT, ROOM)
    sampling.sample(model, steps=1)
    assert model.dynamic.policy.vram_bytes == ROOM and 0 < model.dynamic.resident_bytes <= ROOM


def test_while_a_prompt_runs_what_would_disturb_it_is_put_off(model):
    dynamic = model.dynamic
    before = dynamic.residency
    for name, value in ((model_actions.DROP_RAM, None), (model_actions.LIMIT, MIB), (model_actions.KEEP, True)):
        assert do(model, name, value, running=True)["put_off"]
    assert dynamic.residency is before and dynamic.policy.vram_bytes is None
    assert do(model, model_actions.FREE_VRAM, running=True)["put_off"] == [] and dynamic.resident_bytes == 0
    sampling.sample(model, steps=1)
    assert dynamic.policy.vram_bytes == MIB and dynamic.policy.keep == "always"


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_ledger_and_the_pins_say(model, flux):
    do(model, model_actions.LIMIT, MIB)
    sampling.sample(model, steps=3)
    dynamic, record = model.dynamic, record_of(model)
    assert (
        record["file"]
        and flux.endswith(record["file"])
        and record["samples"]
        and record["format"] == FORMATS[model.model.get_dtype()]
    )
    assert len(record["places"]) == len(record["residency"])
    assert [place == "r" for place in record["places"]] == [resident for *_, resident in record["residency"]]
    pinned = [dynamic.pins.holds(bundle) for bundle in dynamic.execution_order()]
    assert [place == "p" for place in record["places"]] == [
        held and place != "r" for held, place in zip(pinned, record["places"], strict=True)
    ]
    streamed = dynamic.ledger.counters.bytes_streamed
    steps = dynamic.ledger.counters.steps
    sampling.sample(model, steps=1)
    assert record_of(model)["step"]["streamed"] == dynamic.ledger.counters.bytes_streamed - streamed > 0
    assert dynamic.ledger.counters.steps == steps + 1 and record_of(model)["step"]["seconds"] > 0


def test_reports_are_numbered_and_have_warnings_as_notices(model):
    first = memory_report()
    model.dynamic.ledger.decide_once("the device does with less")
    second = memory_report()
    assert second["number"] == first["number"] + 1
    (notice,) = [one for one in second["notices"] if one not in first["notices"]]
    assert notice["text"] == "the device does with less" and notice["from"] == "Flux"


# --- who looks --------------------------------------------------------------------------------------------------------


class Socket:
    """A websocket. Sends nothing more once it is `closed`, and never ends a message once it `sleeps`."""

    def __init__(self):
        self.got, self.closed, self.sleeps = [], False, False

    async def send_str(self, text):
        if self.closed:
            raise ConnectionResetError
        if self.sleeps:
            await asyncio.sleep(60)
        self.got.append(json.loads(text))


class Reports:
    made = 0

    async def get(self):
        await asyncio.sleep(0.02)
        self.made += 1
        return json.dumps({"number": self.made}).encode()


def test_reports_go_to_who_looks_and_none_is_made_when_nobody_does(monkeypatch):
    monkeypatch.setattr(watchers, "SEND_SECONDS", 0.05)
    reports, sockets = Reports(), {name: Socket() for name in ("a", "b", "asleep", "closed")}
    watching = Watchers(reports, sockets.get)

    async def run():
        for name in sockets:
            assert watching.look(name)
        sockets["asleep"].sleeps = sockets["closed"].closed = True
        await asyncio.sleep(0.3)
        assert watching.count == 2, "who takes no message looks no more"
        watching.leave("b")
        await asyncio.sleep(0.05)
        left = len(sockets["b"].got)
        await asyncio.sleep(0.2)
        assert len(sockets["b"].got) == left > 0
        del sockets["a"]  # its page is gone, and said nothing
        await asyncio.sleep(0.1)
        made = reports.made
        await asyncio.sleep(0.2)
        assert watching.count == 0 and reports.made == made
        assert watching.look("b")
        await asyncio.sleep(0.1)
        assert len(sockets["b"].got) > left, "who looks again gets reports again"

    a = sockets["a"]
    asyncio.run(run())
    assert [one["type"] for one in a.got] == ["spillway.state"] * len(a.got)
    numbers = [one["data"]["number"] for one in a.got]
    assert numbers == sorted(set(numbers)) and len(numbers) > 2


def test_who_says_nothing_any_more_is_forgotten(monkeypatch):
    monkeypatch.setattr(watchers, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(watchers, "MOST_PAGES", 1)
    watching = Watchers(Reports(), lambda name: Socket())

    async def run():
        assert watching.look("a") and watching.look("a") and not watching.look("b")
        await asyncio.sleep(0.2)
        assert watching.count == 0 and watching.look("b")

    asyncio.run(run())


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(monkeypatch):
    for name, kind in NODES.items():
        monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, name, kind)
    RAN.clear()
    monkeypatch.setattr(execution, "get_output_data", execution.get_output_data)
    monkeypatch.setattr(execution.PromptExecutor, "execute", execution.PromptExecutor.execute)
    monkeypatch.setattr(run_record, "_current", None)
    assert run_record.install() and run_record.install()


@pytest.mark.usefixtures("recorded")
def test_a_run_is_recorded_node_by_node():
    assert run_record.last_run() is None and run_record.running_node() is None
    executor = Executor().real
    executor.execute(prompt(), "1", {"client_id": "me"}, ["save"])
    assert executor.success
    ran = [name for name, _ in RAN]
    run = run_record.last_run().as_dict()
    assert [node["kind"] for node in run["nodes"]] == ran and run["ended"] and run["running"] is None
    assert all(node["seconds"] >= 0 and node["rss"] > 0 for node in run["nodes"])
    assert sum(node["seconds"] for node in run["nodes"]) <= run["seconds"]


@pytest.mark.usefixtures("recorded")
def test_a_node_that_failed_teaches_nothing(monkeypatch):
    """It has not shown what its model takes, and a plan that goes by that would leave too little free."""
    told = []
    monkeypatch.setattr(run_record, "listener", lambda peaks, began: told.append(began))
    executor = Executor().real
    executor.execute(prompt(), "1", {"client_id": "me"}, ["save"])
    ran = [node.kind for node in run_record.last_run().nodes]
    assert executor.success and len(told) == len(ran)

    def fails(*_, **__):
        raise ValueError("of the node")

    last = NODES[ran[-1]]
    monkeypatch.setattr(last, last.FUNCTION, fails)
    told.clear()
    executor = Executor().real
    executor.execute(prompt(), "2", {"client_id": "me"}, ["save"])
    nodes = run_record.last_run().nodes
    assert not executor.success and nodes[-1].kind == ran[-1]
    assert len(told) == len(nodes) - 1 and nodes[-1].used is None
