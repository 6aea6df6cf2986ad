"""Convert graph and the comparison with ComfyUI, in a browser: links, values and titles stay, and undo works."""

import pytest

from kit.comfyui.panel_graph import graph
from kit.comfyui.running_server import node

THEIRS = {"2": "UNETLoader", "3": "CLIPLoader", "4": "VAELoader"}
OURS = {"2": "SpillwayLoadDiffusionModel", "3": "SpillwayLoadCLIP", "4": "SpillwayLoadVAE"}


def theirs(seed=31):
    """The graph of the panel with ComfyUI's loaders."""
    found = graph(seed=seed)
    found["2"] = node("UNETLoader", unet_name="flux.safetensors", weight_dtype="default")
    found["3"] = node("CLIPLoader", clip_name="clip.safetensors", type="stable_diffusion")
    found["4"] = node("VAELoader", vae_name="ae.safetensors")
    return found


@pytest.fixture(scope="module")
def page(servers, visit):
    page = visit(servers("device"), height=1300)
    page.load(theirs())
    page.open()
    return page


def loaders(page):
    return {name: kind for name, kind in page.kinds().items() if name in THEIRS}


def prompt_of(page):
    return page.page.evaluate("window.app.graphToPrompt().then(({ output }) => output)")


def bare(prompt):
    """A workflow without what a page adds to it."""
    return {name: {"class_type": one["class_type"], "inputs": one["inputs"]} for name, one in prompt.items()}


def test_the_button_puts_our_loaders_there_and_undo_takes_them_back(page, shots):
    page.page.evaluate("window.app.graph.getNodeById(2).title = 'my model'")
    page.page.evaluate("window.app.graph.getNodeById(3).color = '#223344'")
    page.page.evaluate("window.app.extensionManager.workflow.activeWorkflow.changeTracker.checkState()")
    before = prompt_of(page)
    page.page.get_by_role("button", name="Spillway's loaders").first.click()
    page.until(lambda: loaders(page) == OURS)
    shots(page, "converted")
    converted = prompt_of(page)
    assert converted["3"]["inputs"]["clip_name1"] == "clip.safetensors"
    assert {name: one["inputs"] for name, one in converted.items() if name not in THEIRS} == {
        name: one["inputs"] for name, one in before.items() if name not in THEIRS
    }, "all links are as they were"
    assert page.page.evaluate("window.app.graph.getNodeById(2).title") == "my model"
    assert page.page.evaluate("window.app.graph.getNodeById(3).color") == "#223344"
    page.page.locator("canvas").first.focus()
    page.command("Comfy.Undo")
    page.until(lambda: loaders(page) == THEIRS)
    assert bare(prompt_of(page)) == bare(before)
    page.command("Comfy.Redo")
    page.until(lambda: loaders(page) == OURS)
    page.command("Spillway.ConvertBack")
    page.until(lambda: loaders(page) == THEIRS)
    assert bare(prompt_of(page)) == bare(before)
    page.command("Spillway.Convert")
    page.succeed()


def test_one_node_is_converted_from_its_menu(page):
    page.load(theirs())
    page.page.evaluate(
        """() => {
          const node = window.app.graph.getNodeById(4);
          const items = window.app.extensions
            .filter((one) => one.name === "spillway.Convert")
            .flatMap((one) => one.getNodeMenuItems(node));
          items.find((item) => item.content === "Use Spillway's loader").callback();
        }"""
    )
    page.until(lambda: loaders(page) == {**THEIRS, "4": "SpillwayLoadVAE"})


def test_a_loader_that_nothing_stands_for_stays_with_its_links(page):
    limited = graph(seed=32)
    limited["1"] = node("SpillwayPolicy", model=["2", 0], vram_gb=4.0, unit="GB", headroom_gb=0.0, pinned_gb=-1.0)
    limited["2"]["inputs"]["weight_dtype"] = "int8"
    page.load(limited)
    before = prompt_of(page)
    page.command("Spillway.ConvertBack")
    page.until(lambda: loaders(page) == {**THEIRS, "2": "SpillwayLoadDiffusionModel"})
    after = prompt_of(page)
    assert after["2"] == before["2"] and after["7"]["inputs"] == before["7"]["inputs"]
    page.until(lambda: "These stay" in page.page.inner_text("body"))


def test_loaders_in_a_subgraph_are_converted_too(page):
    page.load(theirs(seed=33))
    made = page.page.evaluate(
        """() => {
          const { graph } = window.app;
          if (!graph.convertToSubgraph) return false;
          const nodes = [2, 3, 4, 5].map((id) => graph.getNodeById(id));
          graph.convertToSubgraph(new Set(nodes));
          return true;
        }"""
    )
    assert made
    before = prompt_of(page)
    page.command("Spillway.Convert")
    page.until(lambda: any("SpillwayLoadVAE" == one["class_type"] for one in prompt_of(page).values()))
    after = prompt_of(page)
    assert sorted(after) == sorted(before)
    links = lambda prompt: {  # noqa: E731
        name: {key: value for key, value in one["inputs"].items() if isinstance(value, list)}
        for name, one in prompt.items()
    }
    assert links(after) == links(before), "also those across the border of the subgraph"
    assert {one["class_type"] for one in after.values()} >= set(OURS.values())
    page.succeed()


def test_the_comparison_says_what_each_took(page, shots):
    page.load(theirs(seed=34))
    page.button("Compare").click()
    section = page.page.locator('.spillway-panel section[aria-labelledby="sw-compare"]')
    page.until(lambda: "are equal" in section.inner_text(), 120)
    section.scroll_into_view_if_needed()
    shots(page, "compare")
    said = section.inner_text()
    assert "Pictures: 1 of 1 are equal." in said and "Most of cuda:0" in said
    page.button("Copy as text").click()
    copied = page.until(lambda: page.page.evaluate("navigator.clipboard.readText()"))
    assert "The same graph through ComfyUI's loaders" in copied and "1 of 1 are equal" in copied
    assert page.said == []
