"""How the panel looks and is used: languages, themes, a narrow place, the keyboard, a screen reader."""

import json
import time

import pytest

from kit.comfyui.panel_graph import graph
from kit.comfyui.panel_page import PANEL
from kit.pack import ROOT

MIB = 1 << 20
LANGUAGES = ("en", "zh", "ja")
QUICK = {("zh", "dark"), ("ja", "light")}  # the others look at English
NARROW = 320  # pixels
SAY_SECONDS = 10  # between two sentences of a screen reader that nobody asked for
LEAST_CONTRAST = 4.5  # as WCAG asks for


@pytest.fixture(scope="module")
def server(servers):
    return servers("device")


@pytest.fixture(scope="module")
def page(server, visit):
    """The panel with a model of which a part is resident, and the rest pinned."""
    page = visit(server, height=1400)
    page.load(graph())
    page.open()
    page.succeed()
    (record,) = [model for model in server.get("spillway/memory")["models"] if model["name"] == "Flux"]
    limit = {"model": record["id"], "action": "limit"}
    server.get("spillway/model", {**limit, "value": 8 * MIB})
    page.succeed()
    yield page
    server.get("spillway/model", {**limit, "value": None})
    page.page.context.close()


CONTRAST = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (colours) => {  // painted above one another, as any notation of a colour
        canvas.clearRect(0, 0, 1, 1);
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const light = (parts) => {
        const [r, g, b] = parts.map((c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const element of document.querySelectorAll(".spillway-panel *")) {
        const own = [...element.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        if (!own || element.disabled || !element.offsetParent) continue;
        const grounds = [];
        for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
        const ground = light(rgb(grounds));
        const text = light(rgb([...grounds, getComputedStyle(element).color]));
        const contrast = (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
        found.push([contrast, element.className, element.textContent.slice(0, 40)]);
    }
    return found.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize(
    ("language", "theme"),
    [
        pytest.param(language, theme, marks=[] if (language, theme) in QUICK else [pytest.mark.slow])
        for language in LANGUAGES
        for theme in ("dark", "light")
    ],
)
def test_it_reads_well_in_every_language_and_theme(page, server, visit, shots, language, theme):
    # Not by the page that other tests look at, which would follow.
    server.get("settings", {"Comfy.Locale": language, "Comfy.ColorPalette": theme})
    seen = visit(server, height=1400)
    try:
        seen.load(graph())
        seen.open()
        texts = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["spillway"]
        wanted = [texts["card"]["drop"]["label"], texts["run"]["node"], texts["cache"]["clear"]["label"]]
        said = seen.until(lambda: (text := seen.text()) and all(one in text for one in wanted) and text)
        assert "card." not in said and "{" not in said
        english = seen.page.locator(f"{PANEL} [lang=en]").all_text_contents()
        decisions = seen.page.locator(f"{PANEL} .sw-details li").all_text_contents()
        assert decisions and english == [], "what the server decided is said in the panel's language"
        seen.until(lambda: (seen.page.locator(f".dark-theme {PANEL}").count() > 0) == (theme == "dark"))
        worst = seen.page.evaluate(CONTRAST)
        assert len(worst) > 30 and worst[0][0] >= LEAST_CONTRAST, worst[:3]
        shots(seen, f"{language}-{theme}")
        wide = sticks_out(seen)
        shots(seen, f"{language}-{theme}-narrow")
        assert wide == [0, []]
        assert seen.said == []
    finally:
        seen.page.context.close()
        server.get("settings", {"Comfy.Locale": "en", "Comfy.ColorPalette": "dark"})


def sticks_out(page):
    """What is wider than a narrow panel, with all details open."""
    page.page.evaluate(f"document.querySelector('{PANEL}').style.width = '{NARROW}px'")
    page.page.evaluate(f"document.querySelectorAll('{PANEL} details').forEach((one) => (one.open = true))")
    page.page.wait_for_timeout(300)
    wide = page.page.evaluate(
        f"""() => {{
            const panel = document.querySelector('{PANEL}'), edge = panel.getBoundingClientRect().right;
            const over = [...panel.querySelectorAll('*')].filter((one) => one.getBoundingClientRect().right > edge + 1);
            return [panel.scrollWidth - panel.clientWidth, over.map((one) => one.className + one.textContent)];
        }}"""
    )
    return wide


def test_it_fits_into_a_narrow_place(page, shots):
    wide = sticks_out(page)
    shots(page, "narrow")
    page.page.evaluate(f"document.querySelectorAll('{PANEL} details').forEach((one) => (one.open = false))")
    page.page.evaluate(f"document.querySelector('{PANEL}').style.width = ''")
    assert wide == [0, []]


def test_a_screen_reader_is_told_what_is_drawn(page):
    panel = page.page.locator(PANEL)
    assert panel.get_attribute("role") == "region" and panel.get_attribute("aria-label") == "Memory"
    page.until(lambda: panel.get_by_role("status").text_content().startswith("Flux runs at"))
    for name in ("Where the memory goes", "Models", "Last run", "Output cache"):
        assert panel.get_by_role("region", name=name).count() == 1
    labels = [image.get_attribute("aria-label") for image in panel.get_by_role("img").all()]
    assert any("Headroom" in label for label in labels) and any("in locked RAM" in label for label in labels)
    assert all(labels)
    assert all(button.inner_text().strip() for button in panel.get_by_role("button").all())
    table = panel.get_by_role("table", name="Last run")
    assert table.get_by_role("rowheader").count() >= 1 and table.get_by_role("columnheader").count() == 3
    said = panel.locator(".sw-card .sw-details li").all()
    assert said and {one.get_attribute("lang") for one in said} == {None}, "it is in the language of the panel"


def test_a_screen_reader_hears_of_changes_seldom_and_of_answers_at_once(page):
    """Not of each of four reports a second."""
    status = page.page.locator(PANEL).get_by_role("status")
    page.page.evaluate(
        f"""() => {{
          window.heard = [];
          const said = document.querySelector('{PANEL} [role="status"]');
          new MutationObserver(() => window.heard.push(said.textContent)).observe(
            said, {{ childList: true, characterData: true, subtree: true }});
        }}"""
    )
    begun = time.monotonic()
    page.succeed()
    seldom = 1 + (time.monotonic() - begun) // SAY_SECONDS
    assert len(page.page.evaluate("window.heard")) <= seldom
    page.button("Will it fit?").focus()
    page.page.keyboard.press("Enter")
    page.until(lambda: "Peak" in status.text_content())
    assert page.page.evaluate("document.activeElement.innerText") == "Will it fit?", "the keyboard stays there"


def test_the_keyboard_reaches_it_and_updates_leave_it_there(page):
    """The focus, and a number that is half typed."""
    page.page.locator(f"{PANEL} button").first.focus()
    reached = set()
    for _ in range(40):
        page.page.keyboard.press("Tab")
        reached.add(page.page.evaluate("document.activeElement.innerText"))
    assert {"Free VRAM", "Drop RAM", "Keep", "Clear cache", "Copy report"} <= reached
    page.button("Limit", "flux", role="summary").focus()
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Tab")
    page.page.keyboard.type("1.5")
    before = len(page.states)
    page.until(lambda: len(page.states) > before + 2)
    assert page.page.evaluate("[document.activeElement.name, document.activeElement.value]") == ["gb", "1.5"]
    assert page.said == []
