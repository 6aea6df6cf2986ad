"""What is foreseen of a graph's sampling, on a device with memory of its own, and what the sampling then takes."""

import gc

import comfy.cli_args as cli_args
import comfy.model_management as mm
import comfy_extras.nodes_hunyuan
import comfy_extras.nodes_sd3
import nodes as comfyui_nodes
import pytest

from kit.comfyui.executor import Executor
from kit.comfyui.forecast_graphs import GIB, graph, put_files, register
from kit.comfyui.on_device import wants_aimdo
from spillway.nodes.forecast_report import forecast
from spillway.ops.device.backend import StreamBackend
from spillway.ops.lending import stopwatch
from spillway.patcher.comfyui import graph_policy, run_record
from spillway.patcher.comfyui.forecast import learning, learnt
from spillway.patcher.json_record import read_record, write_record
from spillway.patcher.residency import Residency

MIB = 1 << 20
PAGE = 32 * MIB  # of comfy-aimdo
EXACT = 0.05
OTHER = 0.1  # of the weights, by which the plan that was seen differs from the one that is foreseen
# By name: the file, and what is special. share: of the weights that the policy lets stay.
GRAPHS = {
    "flux": ("forecast-flux.safetensors", {}, 0.5),
    "flux with a LoRA": ("forecast-flux.safetensors", {"lora": True}, 0.5),
    "flux in int8": ("forecast-flux.safetensors", {"dtype": "int8"}, 0.3),
    "flux from GGUF": ("forecast-flux-Q8_0.gguf", {}, 0.4),
    "flux, two pictures": ("forecast-flux.safetensors", {"batch": 2}, 0.7),
    "flux, two samplers": ("forecast-flux.safetensors", {"second": True}, None),
    "wan": ("forecast-wan.safetensors", {"arch": "wan"}, 0.5),
    "sd15": ("forecast-sd15.safetensors", {"arch": "sd15"}, 0.5),
    "lumina2": ("forecast-lumina2.safetensors", {"arch": "lumina2"}, 0.6),
    "z_image": ("forecast-z_image.safetensors", {"arch": "z_image"}, 0.6),
}
# In 16 bit the step computes most at another moment than weights hold most, so both together are never there.
IN_16_BIT = {"wan": (1 - EXACT, 1.2), "flux with a LoRA": (1 - EXACT, 1.1)}
# Where memory has room, more or fewer patched weights wait to be written back, as the device's thread comes to it.
WITH_ROOM = {"flux with a LoRA": (0.5, 1.5), "flux in int8": (1 - EXACT, 1.3)}
# In 16 bit it takes 5 MB, of which one weight that is dequantised or not at the moment of the peak is a tenth.
TINY = {"flux from GGUF": (0.9, 1.15)}
QUICK = ("flux with a LoRA", "flux in int8", "flux from GGUF", "flux, two samplers", "wan", "sd15")


@pytest.fixture(scope="module", autouse=True)
def files(models_dir, checkpoint):
    put_files(models_dir, checkpoint)


@pytest.fixture
def executor(monkeypatch):
    register(monkeypatch)
    for extension in (comfy_extras.nodes_sd3, comfy_extras.nodes_hunyuan):
        for kind in ("EmptySD3LatentImage", "EmptyHunyuanLatentVideo"):
            if hasattr(extension, kind):
                monkeypatch.setitem(comfyui_nodes.NODE_CLASS_MAPPINGS, kind, getattr(extension, kind))
    run_record.install()
    learning.install()
    yield Executor
    graph_policy.begin(None, [])


def limits(name):
    """By how much what is told may differ from what a run of a new plan takes."""
    in_16_bit = not cli_args.args.force_fp32
    loose = WITH_ROOM if wants_aimdo() else IN_16_BIT if in_16_bit else {}
    if in_16_bit:
        loose = {**TINY, **loose}
    return loose.get(name, (1 - EXACT, 1 + EXACT))


def run(executor, card, prompt):
    """Run a prompt from nothing -> (records of its samplers by id, bytes that were in use before)."""
    mm.unload_all_models()
    gc.collect()
    card.drop_cached()
    before = card.memory("used")
    one, ran = executor(), run_record.begin(prompt)
    one.run(prompt)
    found = {record.id: record for record in ran.nodes if record.used is not None}
    del one
    mm.unload_all_models()
    gc.collect()
    return found, before


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in GRAPHS]
)
def test_a_forecast_is_what_the_run_takes(card, executor, name):
    file, special, share = GRAPHS[name]
    (whole, *_) = forecast(graph(file, **special))["samplers"]
    assert not whole["forecast"]["learnt"] or name.startswith("flux")
    gigabytes = None if share is None else share * whole["forecast"]["total"] / GIB
    prompt = graph(file, gigabytes=gigabytes, **special)
    # Another plan of the kind shows the order of the layers, and what is taken beside the weights.
    another = None if share is None else (share + OTHER) * whole["forecast"]["total"] / GIB
    run(executor, card, graph(file, gigabytes=another, seed=7, **special))
    told = {one["id"]: one["forecast"] for one in forecast(prompt)["samplers"]}
    records, before = run(executor, card, prompt)
    again = {one["id"]: one["forecast"] for one in forecast(prompt)["samplers"]}
    assert set(told) == set(records) == {"sampler1", *(["sampler2"] if special.get("second") else [])}
    for one, foreseen in told.items():
        fact, peak = records[one].used, records[one].peaks["cuda:0"] - before
        assert foreseen["size"] == fact["size"] and foreseen["key"] == fact["key"]
        assert foreseen["learnt"] and foreseen["order_known"]
        assert foreseen["streamed"] == fact["streamed"]
        assert foreseen["resident"] == fact["resident"]
        assert (foreseen["streamed"] > 0) == (share is not None)
        least, most = limits(name)
        assert least * peak <= foreseen["peak"] <= most * peak
        assert again[one]["seen"] and again[one]["peak"] == pytest.approx(peak, rel=EXACT)
        assert again[one]["seconds"] == fact["seconds"] > 0 and again[one]["waits"] == fact["waited"]
        assert fact["stalled"] <= fact["seconds"] and (fact["waited"] or 0) <= fact["seconds"]


def test_the_next_plan_goes_by_what_the_last_run_took(card, executor):
    file = "forecast-flux.safetensors"
    # More than a gigabyte, whatever a small model computes. Under comfy-aimdo it is the headroom, and pages are large.
    asked = int(mm.minimum_inference_memory()) if not wants_aimdo() else GIB // 2 + 32 * MIB
    (whole,) = forecast(graph(file))["samplers"]
    if wants_aimdo() and whole["forecast"]["total"] < PAGE:
        pytest.skip("one page of comfy-aimdo holds the whole model in 16 bit, so that nothing is ever brought")
    for number in range(card.count):
        card.set(number, capacity=asked + int(0.7 * whole["forecast"]["total"]))
    run(executor, card, graph(file, seed=7))  # shows the order of the layers
    prompt = graph(file, batch=5)  # a size that no other test has run
    (guessed,) = forecast(prompt)["samplers"]
    first, _ = run(executor, card, prompt)
    told, (again,) = guessed["forecast"], forecast(prompt)["samplers"]
    second, before = run(executor, card, graph(file, batch=5, seed=2))
    assert not told["learnt"] and told["streamed"] > 0 and again["forecast"]["streamed"] == 0
    facts = first["sampler1"].used, second["sampler1"].used
    assert [fact["streamed"] for fact in facts] == [told["streamed"], 0], (
        "the second run leaves free what the first took"
    )
    assert [fact["resident"] for fact in facts] == [told["resident"], again["forecast"]["resident"]]
    peak = second["sampler1"].peaks["cuda:0"] - before
    assert again["forecast"]["peak"] == pytest.approx(peak, rel=EXACT)
    (other,) = forecast(graph(file, batch=4))["samplers"]
    assert not other["forecast"]["learnt"] and other["forecast"]["streamed"] > 0, "of another size nothing is known"


def test_a_run_begins_with_the_pace_of_an_earlier_one(card, executor, monkeypatch):
    """What stays is chosen by it before the first step. Of another size, nothing is known."""
    # This device says of all events that no time lies between them, and small layers send little.
    monkeypatch.setattr(StreamBackend, "seconds_between", lambda self, start, end: 0.001)
    monkeypatch.setattr(stopwatch, "LEAST_BYTES", 1)
    file, began = "forecast-flux.safetensors", []
    (whole,) = forecast(graph(file))["samplers"]
    gigabytes = 0.5 * whole["forecast"]["total"] / GIB
    first_addresses = Residency._first_addresses

    def noted(self):
        if self.total_bytes == whole["forecast"]["total"]:
            began.append(self.remembered.pace if self.remembered.recalled else None)
        return first_addresses(self)

    monkeypatch.setattr(Residency, "_first_addresses", noted)
    for batch in (6, 6, 7):
        run(executor, card, graph(file, gigabytes=gigabytes, batch=batch))
    assert [pace is not None for pace in began] == [False, True, False]
    paces = read_record(learnt.learnt_file(learnt.PACES), learnt.PACES)
    assert list(began[1].seconds.values()) in paces.values() and sum(began[1].seconds.values()) > 0


NO_RECORDS = [
    {"beside": -1, "asked": 1 << 40, "plans": []},
    {"beside": 1 << 70, "asked": 1 << 40, "plans": []},
    {"beside": float("inf"), "asked": 1 << 40, "plans": []},
    {"beside": 1, "asked": 1 << 40, "plans": [["a", 1, 2, 3, 4]]},
    {"beside": 1, "asked": 1 << 40, "plans": 3},
    {"beside": 1, "asked": 1 << 40, "plans": [[1, 2, 3, -4, 5]]},
    {"beside": None, "asked": {}, "plans": []},
    [],
    "text",
]


# Behind the bytes of the plan: seconds, of them waited and stalled.
NO_WAITS = [
    [-30.0, 0.0, 0.0],
    ["a", 0.0, 0.0],
    [30.0, [], 0.0],
    [30.0, "a", 0.0],
    [30.0, -2.0, 0.0],
    [30.0, True, 0.0],
    [30.0, None],
    [30.0, None, float("inf")],
    [30.0, None, None],
]


def test_waits_that_make_no_sense_are_none(card, executor):
    prompt = graph("forecast-flux.safetensors", gigabytes=0.004)
    run(executor, card, prompt)
    path = learnt.learnt_file(learnt.WAITS)
    known = read_record(path, learnt.WAITS)
    try:
        seen = forecast(prompt)["samplers"][0]["forecast"]
        assert seen["seconds"] > 0, "this plan has run"
        stays, streamed = seen["resident"], seen["streamed"]
        write_record(path, learnt.WAITS, {key: [[stays, streamed, 3.0, 2.0, 1.0]] for key in known})
        told = forecast(prompt)["samplers"][0]["forecast"]
        assert (told["seconds"], told["waits"]) == (3.0, 2.0)
        rows = [[[stays, streamed, *row]] for row in NO_WAITS] + [[[True, streamed, 30.0, None, 0.0]], [3], {}, "text"]
        for found in rows:
            write_record(path, learnt.WAITS, {key: found for key in known})
            told = forecast(prompt)["samplers"][0]["forecast"]
            assert (told["seconds"] or 0) < 30 and told["resident"] == stays, found
    finally:
        write_record(path, learnt.WAITS, known)


def test_a_record_that_makes_no_sense_is_no_record(card, executor):
    prompt = graph("forecast-flux.safetensors")
    run(executor, card, prompt)
    path = learnt.learnt_file(learnt.PEAKS)
    known = read_record(path, learnt.PEAKS)
    try:
        assert forecast(prompt)["samplers"][0]["forecast"]["learnt"]
        for found in NO_RECORDS:
            write_record(path, learnt.PEAKS, dict.fromkeys(known, found))
            told = forecast(prompt)["samplers"][0]["forecast"]
            assert not told["learnt"] and not told["seen"], found
        path.write_text("no JSON")
        assert not forecast(prompt)["samplers"][0]["forecast"]["learnt"]
    finally:
        write_record(path, learnt.PEAKS, known)
