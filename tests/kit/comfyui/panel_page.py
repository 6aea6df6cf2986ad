"""A page of ComfyUI in Chromium, with the panel in its sidebar."""

import json
import time

TAB = '[aria-label^="{title}"]'
PANEL = ".spillway-panel"
OURS = ("spillway", "Spillway")
ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


class Page:
    """page: playwright's. said: errors of the console that concern the pack. states: (time, report), as sent."""

    def __init__(self, context, server):
        self.server = server
        self.said, self.states = [], []
        self.page = context.new_page()
        self.page.set_default_timeout(90_000)
        self.page.on("console", lambda message: self._note(message.type, message.text, message.location.get("url", "")))
        self.page.on("pageerror", lambda error: self.said.append(f"{error}"))
        self.page.on("websocket", lambda socket: socket.on("framereceived", self._received))
        self.page.goto(f"http://127.0.0.1:{server.port}/")
        self.page.wait_for_function("window.app?.graph && window.app?.extensionManager?.sidebarTab", timeout=180_000)
        self.page.wait_for_function(
            "window.app.extensionManager.sidebarTab.sidebarTabs.some((tab) => tab.id === 'spillway-memory')"
        )

    def _note(self, kind, text, url):
        if kind == "error" and any(name in text + url for name in OURS):
            self.said.append(f"{text} ({url})")

    def _received(self, data):
        if isinstance(data, str) and data.startswith('{"type": "spillway.state"'):
            self.states.append((time.monotonic(), json.loads(data)["data"]))

    @property
    def is_open(self):
        return self.page.locator(PANEL).count() > 0

    def toggle(self):
        """Press the tab's button, whatever the language."""
        title = self.page.evaluate(
            "window.app.extensionManager.sidebarTab.sidebarTabs.find((tab) => tab.id === 'spillway-memory').tooltip"
        )
        self.page.locator(TAB.format(title=title)).first.click()

    def open(self):
        if not self.is_open:
            self.toggle()
        self.page.wait_for_selector(PANEL)

    def close(self):
        if self.is_open:
            self.toggle()
        self.page.wait_for_selector(PANEL, state="detached")

    def load(self, prompt):
        """Open a graph in the page. Its ids are numbers, as the page makes them."""
        self.page.evaluate("(prompt) => window.app.loadApiJson(prompt, 'test')", prompt)
        self.page.wait_for_function(f"window.app.graph.nodes.length === {len(prompt)}")

    def kinds(self):
        """Return the class of each node of the open graph, by its id."""
        nodes = "window.app.graph.nodes.map((node) => [String(node.id), node.type])"
        return self.page.evaluate(f"Object.fromEntries({nodes})")

    def command(self, name):
        """Run a command of the frontend's."""
        self.page.evaluate("(name) => window.app.extensionManager.command.execute(name)", name)

    def run(self):
        """Press Run. Returns the history of the prompt when it has ended."""
        before = set(self.server.get("history"))
        self.page.evaluate("window.app.queuePrompt(0)")
        ended = self.server.wait(lambda: set(self.server.get("history")) - before, 120)
        return self.server.get(f"history/{(number := ended.pop())}")[number]

    def succeed(self):
        history = self.run()
        assert history["status"]["status_str"] == "success", json.dumps(history["status"])

    def card(self, title):
        return self.page.locator(f'{PANEL} article[aria-label="{title}"]')

    def button(self, name, card=None, role="button"):
        """A button of the panel by its name; of one model's card. role: "summary" for what unfolds."""
        within = self.card(card) if card else self.page.locator(PANEL)
        if role == "summary":
            return within.locator("summary").filter(has_text=name).first
        return within.get_by_role("button", name=name, exact=True).first

    def icon_number(self):
        tabs = "window.app.extensionManager.sidebarTab.sidebarTabs"
        return self.page.evaluate(f"{tabs}.find((tab) => tab.id === 'spillway-memory').iconBadge")

    def badges(self):
        """Kind and text of each node that has a badge of ours, one that says more than the pack's name."""
        return self.page.evaluate(
            """() => window.app.graph.nodes.flatMap((node) => node.badges
                .map((badge) => (typeof badge === "function" ? badge() : badge).text)
                .filter((text) => /^(GPU \\d|[\\d.]+ (s|ms|min))/.test(text))
                .map((text) => ({ kind: node.type, text })))"""
        )

    def text(self):
        return self.page.locator(PANEL).inner_text()

    def until(self, what, seconds=60, panel=True):
        """Wait until `what()` is true, while the page lives on. Returns what it gave. panel: whether it is open."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = what()
            if found:
                return found
            self.page.wait_for_timeout(100)
        raise AssertionError(f"not so after {seconds} s; the panel says:\n{self.text() if panel else 'it is closed'}")

    def set(self, name, value):
        self.page.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value])
