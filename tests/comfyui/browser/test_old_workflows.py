"""A workflow file of before 0.2.0 opens in the page and runs: its compile node is known, with its values in place."""

import pytest

from kit.comfyui.compiling import ORDER, STORED
from kit.comfyui.panel_graph import graph
from kit.comfyui.running_server import node
from spillway.nodes.old_ids import OLD_COMPILE

NEW = "SpillwayLazyTorchCompile"
LIMIT = ORDER.index("dynamo_cache_size_limit") - 1
VALUES = ["cudagraphs", *STORED[1:3], "false", *STORED[4:LIMIT], 0, *STORED[LIMIT + 1 :]]  # nothing is compiled at 0


@pytest.fixture(scope="module")
def page(servers, visit):
    return visit(servers("cpu"))


def old_file(page):
    """A graph as a file, with the node under its old id and its nine values by position, as older files have them."""
    prompt = graph()
    prompt["1"] = node(NEW, model=["2", 0])
    prompt["7"]["inputs"]["model"] = ["1", 0]
    page.load(prompt)
    file = page.page.evaluate("window.app.graph.serialize()")
    (saved,) = [one for one in file["nodes"] if one["type"] == NEW]
    saved["type"], saved["widgets_values"] = OLD_COMPILE, VALUES
    saved["properties"] = {}
    return file


def test_a_file_with_the_old_id_opens_with_its_values_and_runs(page):
    page.page.evaluate("(file) => window.app.loadGraphData(file)", old_file(page))
    page.until(lambda: OLD_COMPILE in page.kinds().values(), panel=False)
    assert not page.page.evaluate("window.app.graph.nodes.some((node) => node.has_errors)")
    prompt = page.page.evaluate("async () => (await window.app.graphToPrompt()).output")
    (inputs,) = [one["inputs"] for one in prompt.values() if one["class_type"] == OLD_COMPILE]
    assert [inputs[name] for name in ORDER[1:]] == VALUES
    page.succeed()
    assert "dynamo_cache_size_limit is 0, so nothing is compiled" in page.server.said()


def test_the_page_can_ask_what_took_the_old_ids_place(page):
    (told,) = page.server.get("node_replacements")[OLD_COMPILE]
    assert told["new_node_id"] == NEW
    assert told["old_widget_ids"] == ORDER[1:]
