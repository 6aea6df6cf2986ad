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
    rows = facts(section, "KSampler #7")
    for name in ("Stays", "Brought each step", "Peak"):
        foreseen, was = rows[name]
        assert foreseen == was and "MB" in was, rows
    assert "MB" in facts(section, "VAE Decode #8")["Peak"][1]
    assert page.said == []


def facts(section, title):
    """What was foreseen of a node and what it was, by the words of the row."""
    found = section.locator(f'article[aria-label="{title}"]')
    return {row.split("\t")[0]: row.split("\t")[1:] for row in found.locator("tbody").inner_text().splitlines()}


def test_a_decoding_that_does_not_fit_is_cut_into_tiles(servers, visit, shots):
    page = visit(servers("device"), height=1300)
    prompt = limited()
    prompt["6"]["inputs"].update(width=4096, height=4096)
    page.load(prompt)
    page.open()
    page.button("Will it fit?").click()
    section = page.page.locator('.spillway-panel section[aria-labelledby="sw-forecast"]')
    page.until(lambda: "In tiles: VAEDecodeTiled" in section.inner_text())
    assert "Text · SD1ClipModel" in section.inner_text()
    page.button("In tiles: VAEDecodeTiled").scroll_into_view_if_needed()
    shots(page, "forecast-does-not-fit")
    page.button("In tiles: VAEDecodeTiled").click()
    page.until(lambda: page.kinds()["8"] == "VAEDecodeTiled" and "(Tiled) #8" in section.inner_text())
    assert "Peak 1.1 of 8.0 GB. In tiles." in section.inner_text()
    sent = page.page.evaluate("window.app.graphToPrompt().then(({ output }) => output)")
    assert sent["8"]["inputs"] == {
        **{"samples": ["7", 0], "vae": ["4", 0], "tile_size": 512, "overlap": 64},
        **{"temporal_size": 64, "temporal_overlap": 8},
    }
    assert sent["9"]["inputs"]["images"] == ["8", 0]
    shots(page, "forecast-in-tiles")
    page.button("Undo").click()
    page.until(lambda: page.kinds()["8"] == "VAEDecode" and "In tiles: VAEDecodeTiled" in section.inner_text())
    page.button("In tiles: VAEDecodeTiled").click()
    page.until(lambda: page.kinds()["8"] == "VAEDecodeTiled")
    page.page.locator("canvas").first.focus()
    page.command("Comfy.Undo")
    page.until(lambda: page.kinds()["8"] == "VAEDecode")
    assert page.said == []
