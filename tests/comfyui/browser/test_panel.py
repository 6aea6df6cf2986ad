"""The panel in a browser: it shows what runs, its buttons do what they say, and it costs nothing while it is closed."""

import json

import pytest

from kit.comfyui.panel_graph import graph

MIB = 1 << 20
BUDGET = 4 * MIB


@pytest.fixture(scope="module", params=["cpu", "device"])
def where(request):
    return request.param


@pytest.fixture(scope="module")
def server(where, start):
    with start(on_device=where == "device") as running:
        yield running


@pytest.fixture(scope="module")
def page(server, visit):
    page = visit(server)
    page.load(graph(vram_gb=BUDGET / (1 << 30)))
    return page


def flux(server):
    (record,) = [model for model in server.get("spillway/memory")["models"] if model["name"] == "Flux"]
    return record


def test_it_shows_a_run_and_the_numbers_of_the_route(page, server, where, shots):
    page.open()
    history = page.run()
    assert history["status"]["status_str"] == "success", json.dumps(history["status"])
    page.until(lambda: "KSampler #7" in page.text())
    shots(page, f"run-{where}")
    said = page.text()
    assert "Flux" in said and "AutoencodingEngine" in said and "SD1ClipModel" in said
    assert "Load Diffusion Model (Spillway) #2" in said
    print(said)
    print(json.dumps(flux(server))[:3000])
    print(page.said)
