"""Will it fit, in a browser: what is foreseen, a button that sets a widget, undo, and the run beside the forecast."""

from kit.comfyui.panel_graph import graph
from kit.comfyui.running_server import node

LIMIT = 0.1  # percent of the device: 8 MB


def limited():
    """The graph of the panel with a policy that lets 8 MB of the Flux stay."""
    amounts = {"headroom_gb": 0.0, "pinned_gb": -1.0, "keep": "auto", "priority": 0}
    found = graph(seed=21)
    found["1"] = node("SpillwayPolicy", model=["2", 0], vram_gb=LIMIT, unit="percent", **amounts)
    found["7"]["inputs"]["model"] = ["1", 0]
    found["6"]["inputs"]["width"] = 96  # a size that no other test of this server has run
    return found


def dtype_of(page):
    widgets = "window.app.graph.getNodeById(2).widgets"
    return page.page.evaluate(f"{widgets}.find((one) => one.name === 'weight_dtype').value")


def test_it_is_foreseen_set_taken_back_and_comes_true(servers, visit, shots):
    server = servers("device")
    page = visit(server, height=1300)
    page.load(limited())
    page.open()
    page.button("Will it fit?").click()
    section = page.page.locator('.spillway-panel section[aria-labelledby="sw-forecast"]')
    page.until(lambda: "stay, and each step brings" in section.inner_text())
    first = section.inner_text()
    assert "ComfyUI's estimate" in first and "KSampler #7" in first
    shots(page, "forecast")
    page.button("weight_dtype: int8").click()
    page.until(lambda: dtype_of(page) == "int8" and "INT8" in section.inner_text())
    shots(page, "forecast-int8")
    page.button("Undo").click()
    page.until(lambda: dtype_of(page) == "default" and "INT8" not in section.inner_text())
    page.button("weight_dtype: int8").click()
    page.until(lambda: dtype_of(page) == "int8" and "INT8" in section.inner_text())
    page.page.locator("canvas").first.focus()
    page.page.evaluate("window.app.extensionManager.command.execute('Comfy.Undo')")
    page.until(lambda: dtype_of(page) == "default")
    page.succeed()
    page.button("Will it fit?").click()
    page.until(lambda: "It was" in section.inner_text() and "an earlier run" in section.inner_text())
    shots(page, "forecast-and-fact")
    rows = {row.split("\t")[0]: row.split("\t")[1:] for row in section.locator("tbody").inner_text().splitlines()}
    for name in ("Stays", "Brought each step", "Peak"):
        foreseen, was = rows[name]
        assert foreseen == was and "MB" in was, rows
    assert page.said == []
