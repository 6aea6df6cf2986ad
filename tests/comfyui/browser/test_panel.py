"""The panel in a browser: it shows what runs, its buttons do what they say, and it costs nothing while it is closed."""

import time

import pytest

from kit.comfyui.panel_graph import graph

MIB = 1 << 20
NAME = "flux"
MOST_A_SECOND = 4


# What the page does with its own means is the same on any device.
QUICK_ON_CPU = (
    "test_it_shows_a_run_with_the_numbers_of_the_route",
    "test_freeing_and_dropping_give_memory_back",
    "test_the_console_has_no_error_of_ours",
)


def pytest_generate_tests(metafunc):
    if "where" in metafunc.fixturenames:
        marks = [] if metafunc.function.__name__ in QUICK_ON_CPU else [pytest.mark.slow]
        metafunc.parametrize("where", [pytest.param("cpu", marks=marks), "device"], scope="module")


@pytest.fixture(scope="module")
def server(where, servers):
    return servers(where)


@pytest.fixture(scope="module")
def page(server, visit):
    """The panel, open, after a first run of many steps, and with a graph of few. Nobody else has run these seeds."""
    page = visit(server)
    page.load(graph(steps=150, seed=7))
    page.open()
    page.succeed()
    page.load(graph(seed=8))
    return page


def flux(server):
    (record,) = [model for model in server.get("spillway/memory")["models"] if model["name"] == "Flux"]
    return record


def test_it_shows_a_run_with_the_numbers_of_the_route(page, server, where, shots):
    page.until(lambda: "VAE Decode #8" in page.text())
    shots(page, f"run-{where}")
    said = page.text()
    assert all(name in said for name in ("Flux", NAME, "clip", "Load Diffusion Model (Spillway) #2", "KSampler #7"))
    assert f"Flux ({'36' if where == 'cpu' else '18'} MB)" in said or "Flux lies on the GPU as a whole" in said
    lived = [model for _, state in page.states for model in state["models"] if model.get("running")]
    assert "Flux" in {model["name"] for model in lived}, "it was marked while it sampled"
    told = server.get("spillway/memory")
    sent = page.until(lambda: next((state for _, state in page.states if state["number"] == told["number"]), None))
    assert sent == told
    ran = {node["kind"] for node in told["run"]["nodes"]}
    assert {"KSampler", "VAEDecode", "SaveImage"} <= ran <= {one["class_type"] for one in graph().values()}
    sampled = next(node for node in told["run"]["nodes"] if node["kind"] == "KSampler")
    assert sampled["seconds"] > 0 and (where == "cpu" or sampled["peaks"]["cuda:0"] > 10 * MIB)
    assert page.icon_number().endswith("%")


def test_it_is_live_and_sends_no_more_than_it_may(page):
    """A busy page takes what has come meanwhile at once, so the mean counts."""
    page.page.wait_for_timeout(100)
    first, began = len(page.states), time.monotonic()
    page.until(lambda: len(page.states) >= first + 3)
    page.page.wait_for_timeout(1000)
    assert len(page.states) - first <= MOST_A_SECOND * (time.monotonic() - began) + 1
    numbers = [state["number"] for _, state in page.states]
    assert numbers == sorted(set(numbers))


def test_a_limit_holds_and_shows(page, server, where, shots):
    page.button("Limit", NAME, role="summary").click()
    page.card(NAME).get_by_label("At most, in GB").fill("0.0078125")
    page.button("Set", NAME).click()
    page.until(lambda: flux(server)["limit"] == 8 * MIB)
    page.succeed()
    record = flux(server)
    resident = sum(size for _, size, here in record["residency"] if here)
    assert 0 < resident <= 8 * MIB < record["total"] and len(set(record["places"])) > 1
    if where == "device":
        share = f"{100 * resident / record['total']:.0f} %"
        page.until(lambda: f"Flux runs at {share} on the GPU" in page.text())
        assert record["step"]["streamed"] >= 0.9 * (record["total"] - resident)
    page.until(lambda: "Limit: 8 MB" in page.text())
    shots(page, f"limited-{where}")
    page.button("As the node says", NAME).click()
    page.until(lambda: flux(server)["limit"] is None)


def test_keep_lets_a_model_stay(page, server):
    page.button("Keep", NAME).click()
    page.until(lambda: flux(server)["keep"] == "always")
    page.until(lambda: page.button("Keep", NAME).get_attribute("aria-pressed") == "true")
    page.button("Keep", NAME).click()
    page.until(lambda: flux(server)["keep"] == "auto")


def test_freeing_and_dropping_give_memory_back(page, server, where):
    page.succeed()
    assert any(here for _, _, here in flux(server)["residency"])
    page.button("Free VRAM" if where == "device" else "Free weights", NAME).click()
    page.until(lambda: not any(here for _, _, here in flux(server)["residency"]))
    page.succeed()
    page.button("Drop RAM", NAME).click()
    page.until(lambda: sum(flux(server)["bytes"][place] for place in ("vram", "pins", "ram")) == 0)
    page.succeed()
    page.button("Free VRAM of all").click()
    page.until(lambda: all(model["bytes"]["vram"] < MIB for model in server.get("spillway/memory")["models"]))


def test_a_link_shows_the_node(page):
    page.button("Load Diffusion Model (Spillway) #2 →", NAME).click()
    chosen = page.page.evaluate("Object.values(window.app.canvas.selected_nodes).map((node) => String(node.id))")
    assert chosen == ["2"]


def test_the_report_is_copied(page):
    page.button("Copy report").click()

    def copied():  # something else was copied before, perhaps
        text = page.page.evaluate("navigator.clipboard.readText()")
        return text if text.startswith("## Memory") else None

    text = page.until(copied)
    assert "**flux** (Flux" in text and "| KSampler (7) |" in text


def test_the_cache_is_cleared(page, server):
    assert server.get("spillway/memory")["cache"]["entries"] > 5
    page.button("Clear cache").click()
    page.until(lambda: server.get("spillway/memory")["cache"]["entries"] == 0)
    page.until(lambda: page.button("Clear cache").is_disabled())


def test_keys_open_and_close_it(page):
    page.page.keyboard.press("Alt+Shift+U")
    page.until(lambda: not page.is_open, panel=False)
    page.page.keyboard.press("Alt+Shift+U")
    page.until(lambda: page.is_open, panel=False)


def test_nothing_is_sent_while_it_is_closed(page, server, where, shots):
    """Not while a prompt runs, either. The number and the badges come with one question after it."""
    page.close()
    page.page.wait_for_timeout(1000)
    before = len(page.states)
    page.succeed()
    page.page.wait_for_timeout(1500)
    assert len(page.states) == before
    ours = server.get("spillway/memory")["run"]
    assert ours["ended"] and ours["nodes"]
    page.until(lambda: "KSampler" in {node["kind"] for node in page.badges()}, panel=False)
    shots(page, f"closed-{where}")
    page.open()
    page.until(lambda: len(page.states) > before)


def test_the_console_has_no_error_of_ours(page):
    assert page.said == []
