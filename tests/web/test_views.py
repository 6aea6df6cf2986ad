"""What the panel draws and says of a report: its views are pure functions, which run in node without a page."""

import re

import pytest

from kit.locales import LOCALES, flat, texts
from kit.pack import ROOT
from kit.page_modules import copy_modules, run_script

GIB = 1 << 30
LANGUAGES = ("en", "zh", "ja")
LAYERS = 40


def report(**changes):
    """A report of a Flux of 12 GB, half on a device of 12 GB, a third of the rest pinned."""
    residency = [[f"block.{index}", int(0.3 * GIB), index % 2 == 0] for index in range(LAYERS)]
    places = "".join("r" if index % 2 == 0 else "p" if index % 3 == 0 else "f" for index in range(LAYERS))
    model = {
        "id": 1,
        "name": "Flux",
        "file": "flux1-dev.safetensors",
        "by": "Spillway",
        "device": "cuda:0",
        "total": 12 * GIB,
        "bytes": {"vram": 6 * GIB, "pins": 2 * GIB, "ram": 0, "disk": 12 * GIB},
        "own_ram": 0,
        "format": "bf16",
        "vbar": "software",
        "decisions": ["half of it fits"],
        "residency": residency,
        "places": places,
        "node": {"id": "2", "kind": "SpillwayLoadDiffusionModel"},
        "samples": True,
        "running": True,
        "keep": "auto",
        "limit": None,
        "chosen": [],
        "kept_free": GIB,
        "steps": 8,
        "step": {"streamed": 6 * GIB, "seconds": 2.0, "compute": 1.5, "bus": 12.0 * GIB},
    }
    memory = {
        "anonymous": 4 * GIB,
        "page_cache": 6 * GIB,
        "pinned": 2 * GIB,
        "cached": GIB // 2,
        "available": 14 * GIB,
        "total": 24 * GIB,
        "reason": "the machine's 24.0 GiB",
        "aimdo": 0,
        "devices": {"cuda:0": {"allocated": 7 * GIB, "reserved": 8 * GIB, "free": 3 * GIB, "total": 12 * GIB}},
    }
    node = {"id": "7", "kind": "KSampler", "seconds": 16.2, "peaks": {"cuda:0": 9 * GIB}, "rss": 5 * GIB}
    cache = {
        "entries": 4,
        "ram_bytes": GIB // 2,
        "headroom_bytes": 2 * GIB,
        "cap_bytes": None,
        "run": {"hits": 1, "saved_seconds": 2.0, "misses": 3, "evictions": 0},
        "largest": [{"id": "8", "node": "VAEDecode", "ram_bytes": GIB // 4, "seconds": 1.0}],
        "decisions": ["evicted 2 outputs"],
    }
    whole = {
        "number": 1,
        "names": {"cuda:0": "NVIDIA GeForce RTX 3060"},
        "memory": memory | changes.pop("memory", {}),
        "models": [model | changes.pop("model", {})],
        "cache": cache,
        "run": {"seconds": 20.0, "ended": True, "running": None, "nodes": [node]},
        "notices": [],
    }
    return whole | changes


def seen(reports, language="en"):
    """What the views make of each report. Fails where a text or a value of one is missing."""
    locale = LOCALES / language / "main.json"
    result = run_script(seen.folder, "views.mjs", reports, locale, skipped="the panel's views: they need node")
    assert result["missing"] == []
    seen.asked |= set(result["asked"])
    return result["told"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    seen.folder, seen.asked = tmp_path_factory.mktemp("views"), set()
    copy_modules(seen.folder, "views.mjs")


CPU = {"device": "cpu", "bytes": {"vram": 0, "pins": 0, "ram": 0, "disk": 1}, "kept_free": 0}
SENTENCES = {
    "costs": ({}, "6.0 of 12.0 GB are brought each step, which costs 0.5 s of the 2.0 s that a step takes."),
    "hidden": ({"step": {"streamed": 6 * GIB, "seconds": 1.52, "compute": 1.5, "bus": 1.0}}, "hidden behind the"),
    "untimed": (
        {"step": {"streamed": 6 * GIB, "seconds": 2.0, "compute": None, "bus": None}},
        "are brought each step.",
    ),
    "whole": ({"residency": [["a", GIB, True]], "places": "r"}, "lies on the GPU as a whole (1.0 GB)"),
    "not used yet": (
        {"steps": 0, "residency": [["a", GIB, False]], "places": "f", "running": False},
        "waits in its file until it is used",
    ),
    "on the CPU": (CPU, "used where they lie in the file, and nothing is copied"),
    "copies on the CPU": (CPU | {"own_ram": GIB}, "1.0 GB of them are copies in RAM"),
    "ComfyUI's": ({"by": "ComfyUI", "places": None}, "is managed by ComfyUI: 50 % of 12.0 GB on cuda:0"),
}


def test_the_sentence_sums_up():
    told = seen([report(model=changes) for changes, _ in SENTENCES.values()])
    for one, (name, (_, words)) in zip(told, SENTENCES.items(), strict=True):
        assert words in one["sum"], name
        assert one["sum"] in one["text"]
    assert "Flux runs at 50 % on the GPU" in told[0]["sum"]
    (none,) = seen([report(models=[], run=None, cache=None)])
    assert "No model is loaded" in none["sum"] and "Nothing has run yet" in none["text"]


def test_the_parts_of_a_bar_add_up_to_the_whole():
    odd = [
        report(),
        report(memory={"anonymous": 0}),
        report(memory={"pinned": 30 * GIB, "page_cache": 90 * GIB}),
        report(model={"kept_free": 40 * GIB}),
        report(model={"vbar": "aimdo"}),
        report(memory={"devices": {"cuda:0": {"allocated": 0, "reserved": 0, "free": 1, "total": 12 * GIB}}}),
    ]
    for one in seen(odd):
        for bar in (*one["devices"], one["ram"]):
            assert sum(part["bytes"] for part in bar["parts"]) == pytest.approx(bar["total"]), bar
            assert all(part["bytes"] >= 0 for part in bar["parts"])
    assert seen(odd[:1])[0]["devices"][0]["parts"][0]["name"] == "flux1-dev"
    first = {part["kind"]: part["bytes"] / GIB for part in seen(odd[:1])[0]["devices"][0]["parts"]}
    assert first == {"weights": 6, "working": 2, "others": 1, "headroom": 1, "free": 2}
    ram = {part["kind"]: part["bytes"] / GIB for part in seen(odd[:1])[0]["ram"]["parts"]}
    assert ram == {"pins": 2, "models": 0, "cache": 0.5, "process": 1.5, "others": 6, "files": 6, "free": 8}
    mapped = {part["kind"]: part["bytes"] / GIB for part in seen(odd[4:5])[0]["devices"][0]["parts"]}
    assert mapped["working"] == 3, "what comfy-aimdo maps is not in torch's memory, so all but the weights is at work"


def test_a_strip_has_every_layer_where_it_lies():
    (told,) = seen([report()])
    (card,) = told["cards"]
    assert card["title"] == "flux1-dev" and card["share"] == 0.5
    assert card["strip"][0]["from"] == 0 and card["strip"][-1]["to"] == pytest.approx(1)
    for place, size in card["inPlace"].items():
        drawn = sum(part["to"] - part["from"] for part in card["strip"] if part["place"] == place)
        assert drawn == pytest.approx(size / sum(card["inPlace"].values()))


def test_the_icon_and_the_badges():
    (told,) = seen([report()])
    assert told["icon"] == "75%" and told["badges"] == [{"share": 0.5}, {"seconds": 16.2, "peak": 9 * GIB}]
    (on_cpu,) = seen([report(model=CPU, memory={"devices": {}})])
    assert on_cpu["icon"] == "42%" and on_cpu["badges"][0] is None


def test_decisions_are_told_in_the_panels_language_and_copied_in_english():
    decisions = ["gave 1.0 GiB of pins back: RAM runs short", "a sentence that nobody has translated"]
    one = report(model={"decisions": decisions})
    one["cache"]["decisions"] = ["an evicted output was not kept: disk full"]
    (told,) = seen([one], "zh")
    assert texts("zh", "main")["spillway"]["said"]["pins"]["short"] in told["text"] and decisions[0] not in told["text"]
    assert "an evicted" not in told["text"] and "disk full" in told["text"] and decisions[1] in told["text"]
    assert told["english"] == decisions[1:], "a screen reader is told that it is English"
    assert decisions[0] in told["copied"]


def test_the_copied_text_has_it_all():
    (told,) = seen([report()])
    for words in ("RTX 3060", "flux1-dev", "half of it fits", "| KSampler (7) | 16 s | 9.0 GB |", "4 outputs"):
        assert words in told["copied"]


def shared(**changes):
    """What is told of a shared store."""
    told = {"address": "file:///mnt/nas", "state": None, "found": 3, "saved_seconds": 75.0, "written": 5}
    return told | {"written_bytes": 2 * GIB} | changes


def test_a_line_says_what_the_shared_store_gave_and_one_what_is_wrong():
    well, ill, off = seen([report(store=shared()), report(store=shared(state="no answer within 5 s")), report()])
    line, trouble = "Shared store: 3 found (1 min 15 s saved), 5 written (2.0 GB)", "no answer within 5 s"
    for part in ("text", "copied"):
        assert line in well[part] and trouble not in well[part]
        assert line in ill[part] and f"not used for a while: {trouble}" in ill[part]
        assert "Shared store" not in off[part]


def coming(**changes):
    """What is told of a file that comes from elsewhere."""
    told = {"file": "flux2.safetensors", "address": "https://server/flux2.safetensors", "stopped": None}
    return told | {"come_bytes": 3 * GIB, "total_bytes": 12 * GIB, "speed": GIB / 8} | changes


# Of each language: that it comes, and how fast and for how long yet; and that no more does.
COMING = {
    "en": ("flux2.safetensors is coming", ("3.0 of 12.0 GB, 0.1 GB a second, 1 min 12 s left",), "and no more comes"),
    "zh": ("flux2.safetensors 正在下载", ("3.0 / 12.0 GB", "每秒 0.1 GB", "还需 1 min 12 s"), "下载已停止"),
    "ja": ("flux2.safetensors をダウンロード中", ("3.0 / 12.0 GB、毎秒 0.1 GB、残り 1 min 12 s",), "止まっています"),
}


@pytest.mark.parametrize("language", COMING)
def test_a_line_for_each_file_that_is_coming_says_how_far_it_is(language):
    comes, figures, stops = COMING[language]
    begins, fails = coming(come_bytes=0, speed=0), coming(stopped="the disk is full", speed=0)
    some, both, third, none = seen(
        [report(coming=[begins]), report(coming=[coming(), begins]), report(coming=[fails]), report(coming=[])],
        language,
    )
    for part in ("text", "copied"):
        assert some[part].count(comes) == 1 and figures[0] not in some[part]
        assert both[part].count(comes) == 2 and all(words in both[part] for words in figures)
        assert comes not in third[part] and stops in third[part] and "the disk is full" in third[part]
        assert "flux2" not in none[part] and stops not in both[part]


# --- will it fit ------------------------------------------------------------------------------------------------------

NOTES = (
    "unknown",
    "passed",
    "theirs",
    "wired",
    "missing",
    "circle",
    "policy",
    "size",
    "int8_auto",
    "int8_lora",
    "text",
    "error",
)


def foreseen(**changes):
    """What is foreseen of that Flux."""
    return {
        "total": 12 * GIB,
        "resident": 6 * GIB,
        "streamed": 6 * GIB,
        "peak": 9 * GIB,
        "device_total": 12 * GIB,
        "computation": 2 * GIB,
        "at_least": 1.5,
        "seconds": None,
        "waits": None,
        "fits": True,
        "learnt": True,
        "seen": False,
        "order_known": True,
        "name": "Flux",
        "format": "bf16",
        "key": "flux at 1024",
    } | changes


def asked(told, notes=(), undo=None, busy=False):
    """What the panel keeps of a forecast, with every way out."""
    values = {"node": "5", "kind": "Odd", "widget": "unet_name", "words": "no such file"}
    ways = [
        {"code": code, "id": "2", "kind": "SpillwayLoadDiffusionModel", "widget": "weight_dtype", "value": code}
        for code in ("int8", "four_bits", "gguf", "batch")
    ]
    smaller = foreseen(total=6 * GIB, resident=6 * GIB, streamed=0, peak=8 * GIB)
    sampler = {
        "id": "7",
        "kind": "KSampler",
        "forecast": told,
        "notes": [{"code": code, **values} for code in notes],
        "ways": [way | {"forecast": smaller} for way in ways] if told else [],
    }
    return {
        "busy": busy,
        "told": {"samplers": [sampler], "uses": beside() if told else [], "left_out": 1},
        "undo": undo,
    }


def beside():
    """What is told of a text encoder that does not fit, and of a VAE that decodes and one that encodes."""
    clip = foreseen(name="T5", total=9 * GIB, resident=3 * GIB, computation=0, learnt=False, key="text", at_least=None)
    vae = foreseen(name="AutoencodingEngine", total=GIB, resident=GIB, streamed=0, learnt=False, tiled=False, key="vae")
    over, tiled = vae | {"fits": False, "peak": 20 * GIB}, vae | {"peak": 3 * GIB, "tiled": True}
    swap = {"code": "tiled", "id": "8", "kind": "VAEDecode", "swap": "VAEDecodeTiled", "values": {"tile_size": 512}}
    smaller = {"code": "tiles", "id": "4", "kind": "VAEEncodeTiled", "widget": "tile_size", "value": 256}
    nodes = {"3": ("CLIPTextEncode", "text", clip, []), "8": ("VAEDecode", "decode", over, [swap])}
    nodes["4"] = ("VAEEncodeTiled", "encode", over | {"tiled": True}, [smaller])
    return [
        {
            **{"id": name, "kind": kind, "what": what, "forecast": told, "notes": []},
            "ways": [way | {"forecast": tiled} for way in ways],
        }
        for name, (kind, what, told, ways) in nodes.items()
    ]


FORECASTS = [
    asked(foreseen()),
    asked(foreseen(seconds=2.0, waits=0.5)),
    asked(foreseen(seconds=2.0, waits=0.01)),
    asked(foreseen(fits=False, learnt=False, order_known=False, peak=14 * GIB), NOTES, undo={"value": 1}),
    asked(None, NOTES[:1], busy=True),
    {"busy": False, "told": {"samplers": [], "uses": [], "left_out": 0}, "undo": None},
]


def test_a_forecast_says_what_fits_and_what_could_be_set():
    told = seen([report(forecast=one) for one in FORECASTS])
    part, waits, hidden, over, unknown, none = (one["text"] for one in told)
    assert "6.0 of 12.0 GB stay, and each step brings 6.0 GB. A step takes at least 1.5 s. Peak 9.0 of 12.0 GB." in part
    assert "brings 6.0 GB. A step takes about 2.0 s, 0.5 s of it waiting for the bus. Peak 9.0" in waits
    assert "brings 6.0 GB. A step takes about 2.0 s. Peak 9.0" in hidden, "a wait that nobody would notice"
    assert "weight_dtype: int8" in part and "8 bits: All of it stays (6.0 GB). Peak 8.0 of 12.0 GB." in part
    assert "It does not fit: peak 14.0 of 12.0 GB." in over and "1024 x 1024 is assumed" in over and "Undo" in over
    assert "no loader was found behind it" in unknown and "Looking…" in unknown
    assert "There is no sampler" in none


def test_text_encoders_and_vaes_stand_behind_the_samplers():
    words = " ".join(seen([report(forecast=FORECASTS[0])])[0]["text"].split())
    assert words.index("KSampler") < words.index("Text · T5") < words.index("Decoding · AutoencodingEngine")
    assert "3.0 of 9.0 GB stay, and each use brings 6.0 GB. Peak" in words
    assert "It does not fit: peak 20.0 of 12.0 GB. " in words
    tiles = "tiles of 512 pixels: All of it stays (1.0 GB). Peak 3.0 of 12.0 GB. In tiles."
    assert f"In tiles: VAEDecodeTiled {tiles}" in words
    assert "tile_size: 256 smaller tiles: All of it stays" in words


def test_forecast_and_fact_stand_side_by_side():
    sampled = {"key": "flux at 1024", "resident": 6 * GIB, "streamed": 5 * GIB, "seconds": 1.7, "peak": 8 * GIB}
    node = {"id": "7", "kind": "KSampler", "seconds": 16.2, "peaks": {}, "rss": GIB, "used": sampled}
    run = {"seconds": 20.0, "ended": True, "running": None, "nodes": [node]}
    told, other = seen(
        [report(run=run, forecast=FORECASTS[0]), report(run=run, forecast=asked(foreseen(key="another size")))]
    )
    words = " ".join(told["text"].split())
    assert (
        "Brought each step 6.0 GB 5.0 GB" in words and "A step 1.5 s 1.7 s" in words and "Peak 9.0 GB 8.0 GB" in words
    )
    assert "Of it waiting" not in words and "Waiting for the file" not in words
    sampled |= {"waited": 0.3, "stalled": 0.2}
    words = " ".join(seen([report(run=run, forecast=asked(foreseen(seconds=2.0, waits=0.5)))])[0]["text"].split())
    assert "A step 2.0 s 1.7 s Of it waiting 0.5 s 0.3 s Waiting for the file \u2013 0.2 s Peak" in words
    assert "Brought each step" not in other["text"], "that was another model, size or format"
    decoded = {"key": "vae", "resident": GIB, "streamed": 0, "seconds": 0.4, "peak": 9 * GIB}
    run["nodes"] = [{"id": "8", "kind": "VAEDecode", "seconds": 0.5, "peaks": {}, "rss": GIB, "used": decoded}]
    words = " ".join(seen([report(run=run, forecast=FORECASTS[0])])[0]["text"].split())
    assert "Brought each time 0 0 Peak 20.0 GB 9.0 GB" in words and "A step 1.5 s" not in words


# --- the limit of the RAM ---------------------------------------------------------------------------------------------


LIMITS = {
    "machine": "Limited by the machine's 24.0 GB",
    "commit": "Limited by Windows' commit limit of 24.0 GB",
    "process": "Limited to 24.0 GB for this process (ulimit)",
    "cgroup": "Limited by the container to 24.0 GB (cgroup)",
    "variable": "Limited by SPILLWAY_RAM_GB to 24.0 GB",
    "something new": "Limited by the machine's 24.0 GiB",
}


def test_who_limits_the_ram_is_said_in_the_users_language():
    """A limit of a kind that the page does not know is named in the server's words."""
    reports = [report(memory={"limit": kind}) for kind in LIMITS]
    for words, told in zip(LIMITS.values(), seen(reports), strict=True):
        assert words in " ".join(told["text"].split())
    (told,) = seen([report(memory={"limit": "cgroup", "stalled": 0.25})], "ja")
    assert "コンテナーの 24.0 GB" in told["text"] and "25 %" in told["text"]


# --- the comparison with ComfyUI --------------------------------------------------------------------------------------


def comparison(state="done", same=(), kept=(), left=(), text="t", **shown):
    """What the server says of one. shown: by kind what differs from two that are equal."""
    run = {"state": "done", "seconds": 12.3, "rss": 3 * GIB, "peaks": {"cuda:0": 9 * GIB}}
    runs = {"ComfyUI": run, "Spillway": run | {"seconds": 8.1, "peaks": {}}}
    two = {"count": 2, "frames": 2, "equal": 2, "most": 0, "other": 0}
    found = {kind: two | changes for kind, changes in shown.items()}
    told = {"state": state, "runs": runs, "shown": {**found, "left": list(left)}, "text": text}
    return {**told, "same": list(same), "kept": list(kept)}


COMPARISONS = [
    comparison(pictures={}),
    comparison(pictures={"equal": 1, "most": 7}, same=["Quantise Model (Spillway) #4"], kept=["SD1ClipModel"]),
    comparison(left=["mesh.glb (9)"]),
    comparison("runs", text=None),
    comparison("was interrupted", text=None),
    comparison(
        pictures={"count": 1, "equal": 1, "frames": 49}, sounds={"equal": 0, "most": 0.01234, "other": 1}, latents={}
    ),
    comparison("failed: on purpose"),
    comparison(latents={"equal": 1, "most": 0.5}),
]


def test_a_comparison_stands_side_by_side():
    told = seen([report(comparison=one) for one in COMPARISONS])
    same, other, none, runs, ended, every, failed, latents = (" ".join(one["text"].split()) for one in told)
    assert "ComfyUI Spillway Seconds 12 s 8.1 s Most RAM 3.0 GB 3.0 GB Most of cuda:0 9.0 GB 0 Pictures: 2" in same
    assert "Pictures: 2 of 2 are equal." in same and "Copy as text" in same
    assert "Pictures: 1 of 2 are equal; others differ by up to 7 of 255." in other
    assert "Spillway's in both runs, as ComfyUI has nothing like it: Quantise Model (Spillway) #4." in other
    assert "models of the first, which another pack keeps: SD1ClipModel." in other and "another pack" not in same
    assert "nothing that could be compared" in none and "Not compared: mesh.glb (9)." in none
    assert "Running…" in runs and "Most RAM" not in runs and "Copy as text" not in runs
    assert "The comparison did not end: was interrupted." in ended and "Copy as text" not in ended
    assert "Pictures: 1 of 1 are equal, in all their 49 frames." in every and "Latents: 2 of 2 are equal." in every
    assert "Sound: 0 of 2 are equal; others differ by up to 0.0123 of full scale; 1 are in one run" in every
    assert "did not end: failed: on purpose." in failed and "Copy as text" in failed, "what there is can be copied"
    assert "Latents: 1 of 2 are equal; others differ by up to 0.5." in latents


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES[1:])
@pytest.mark.parametrize("name", ["main", "commands", "settings"])
def test_every_language_has_every_text(language, name):
    english, other = dict(flat(texts("en", name))), dict(flat(texts(language, name)))
    assert list(other) == list(english)
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", other[key])) == sorted(re.findall(r"\{\w+\}", text)), key


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_that_the_code_asks_for_is_there_and_used(language):
    """Views in their odd states too, and the texts of toasts, which no view shows."""
    seen([report(model=changes) for changes, _ in SENTENCES.values()], language)
    seen([report(models=[], run=None, cache=None), *(report(forecast=one) for one in FORECASTS)], language)
    took = {"key": FORECASTS[0]["told"]["samplers"][0]["forecast"]["key"], "resident": 1, "streamed": 1, "seconds": 1.0}
    node = {"id": "7", "kind": "KSampler", "seconds": 1.0, "peaks": {}, "rss": 1}
    run = {"seconds": 1.0, "ended": True, "running": None}
    run["nodes"] = [node | {"used": took | {"peak": 1, "waited": 0.5, "stalled": 0.5}}]
    seen([report(run=run, forecast=FORECASTS[0])], language)
    seen([report(comparison=one) for one in COMPARISONS], language)
    seen([report(memory={"limit": kind}) for kind in LIMITS], language)
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web" / "js").rglob("*.js"))
    known = {key for key, _ in flat(texts(language, "main")["spillway"]) if not key.startswith(("said.", "list."))}
    named = set(re.findall(r'"([a-z]+(?:\.[a-z]+)*)"', code))
    unused = known - named - seen.asked - COMPOSED
    assert not unused


# Keys that the code puts together.
COMPOSED = {f"{area}.title" for area in ("memory", "models", "run", "cache", "forecast", "compare")}
# The rows of a forecast that has come true.
COMPOSED |= {f"forecast.{name}" for name in ("told", "was", "row.stays", "row.streamed", "row.step", "row.peak")}


def test_the_english_settings_and_commands_are_those_of_the_code():
    code = "".join(
        (ROOT / "web" / "js" / name).read_text(encoding="utf-8") for name in ("memory.js", "settings.js", "convert.js")
    )
    joined = re.sub(r'"\s*\+\s*"', "", code)
    for table in ("settings", "commands"):
        for _, text in flat(texts("en", table)):
            assert f'"{text}"' in joined, text
