// The sidebar tab 'Memory', its commands, the badges of nodes and the number on the tab's icon.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { withTheirs } from "./convert/prompt.js";
import { Connection, fetchComparison, fetchReport, post } from "./panel/connection.js";
import { iconNumber } from "./panel/figures.js";
import { addBadge, goTo, nodeTitle, setWidget, swapNode } from "./panel/graph.js";
import { showNotices, toast } from "./panel/notices.js";
import { inEnglish, loadTexts, t } from "./panel/text.js";
import { draw } from "./panel/tree.js";
import { comparisonInWords } from "./panel/compare.js";
import { inWords } from "./panel/forecast.js";
import { panelView } from "./panel/view.js";
import { asText, size, summary } from "./panel/words.js";

const ID = "spillway-memory";
const LOOK_MS = 1000; // how often to ask how far a comparison is
const SAY_MS = 10000; // how often a screen reader says the sentence that sums up, at most
const state = {
  report: null,
  root: null,
  comparison: null,
  forecast: { busy: false, told: null, undo: null },
  said: { words: "", at: 0 },
};
const setting = (name) => app.extensionManager.setting.get(`Spillway.Panel.${name}`) ?? true;

function redraw() {
  if (!state.root) return;
  draw(state.root, panelView(state.report, actions, t, state.forecast, state.comparison, state.said.words));
}

/** Let a screen reader say something. */
function say(words) {
  state.said = { words, at: Date.now() };
  redraw();
}

function sayInTime(report) {
  const now = summary(report, t);
  if (now !== state.said.sum && Date.now() - state.said.at >= SAY_MS) state.said = { words: now, sum: now, at: Date.now() };
}

function show(report) {
  state.report = report;
  sayInTime(report);
  redraw();
  showNotices(report, setting("Toasts"));
  const tab = app.extensionManager.sidebarTab?.sidebarTabs?.find((one) => one.id === ID);
  if (tab) tab.iconBadge = iconNumber(report);
  if (!state.root) app.canvas?.setDirty?.(true, true);
}

/** Do what a button says, and say what came of it. */
async function act(words, path, body) {
  try {
    const done = await post(path, body);
    const late = done.put_off ?? [];
    toast(
      late.length ? "info" : "success",
      late.length ? `${words}: ${t(path === "model" ? "later.model" : "later.free")}` : doneWords(words, done),
    );
    return done;
  } catch (error) {
    toast("error", t.said(error.message).text);
    return null;
  }
}

function doneWords(words, { freed, cache_bytes }) {
  const bytes = (freed?.device ?? 0) + (freed?.pins ?? 0) + (cache_bytes ?? 0);
  return bytes ? `${words}: ${t("freed", { size: size(bytes) })}` : t("done", { what: words });
}

async function copy(text) {
  const area = document.createElement("textarea");
  try {
    await navigator.clipboard.writeText(text); // not there on pages that came without encryption from elsewhere
  } catch {
    area.value = text;
    (state.root ?? app.canvas.canvas.parentElement).append(area); // not the page's body, which is everybody's
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** Do what a way out says, and give the way back; null where the graph has changed meanwhile. */
function changeGraph(way) {
  const { id, kind } = way;
  const before = way.swap ? swapNode(way, way.swap, way.values) : setWidget(way, way.widget, way.value);
  if (!before) return null;
  return way.swap ? { id, kind: way.swap, swap: kind, ...before } : { id, kind, widget: way.widget, ...before };
}

const model = (card, action, rest = {}) => ({ model: card.id, action, ...rest });

const actions = {
  nodeTitle,
  goTo: (node) => goTo(node) || toast("info", t("card.gone")),
  free: (card) => act(`${card.title}: ${t("card.free.label")}`, "model", model(card, "free_vram")),
  drop: (card) => act(`${card.title}: ${t("card.drop.label")}`, "model", model(card, "drop_ram")),
  keep: (card, value) => act(`${card.title}: ${t("card.keep.label")}`, "model", model(card, "keep", { value })),
  limit: (card, value) => act(`${card.title}: ${t("card.limit.none")}`, "model", model(card, "limit", { value })),
  async forecast() {
    if (state.forecast.busy) return;
    state.forecast.busy = true;
    redraw();
    try {
      const { output } = await app.graphToPrompt();
      state.forecast.told = await post("forecast", { prompt: output });
    } catch (error) {
      toast("error", t.said(error?.message ?? error).text);
    } finally {
      state.forecast.busy = false;
    }
    say(state.forecast.told?.samplers.map(({ forecast }) => (forecast ? inWords(forecast, t) : "")).join(" ") ?? "");
  },
  setWay(way) {
    const undo = changeGraph(way);
    if (!undo) return toast("info", t("card.gone"));
    state.forecast.undo = undo;
    return actions.forecast();
  },
  undoWay() {
    const { undo } = state.forecast;
    state.forecast.undo = null;
    if (!undo || !changeGraph(undo)) toast("info", t("card.gone"));
    return actions.forecast();
  },
  async compare() {
    if (state.comparison?.state === "runs") return;
    try {
      const { output } = await app.graphToPrompt();
      const client_id = api.clientId ?? api.initialClientId;
      showComparison(await post("compare", { prompt: output, comfyui: withTheirs(output), client_id }));
    } catch (error) {
      toast("error", t.said(error.message).text);
    }
  },
  copyComparison: async () => {
    await copy(state.comparison.text);
    toast("success", t("copy.done"));
  },
  freeAll: () => act(t("models.free.label"), "free", { models: true }),
  clearCache: () => act(t("cache.clear.label"), "free", { cache: true }),
  async copy() {
    try {
      await copy(asText(await fetchReport(), inEnglish));
      toast("success", t("copy.done"));
    } catch (error) {
      toast("error", t.said(error.message).text);
    }
  },
};

/** Show a comparison, and ask for it again while it runs. */
function showComparison(told) {
  if (told.state !== state.comparison?.state) say(comparisonInWords(told, t));
  state.comparison = told;
  redraw();
  if (told.state === "runs")
    setTimeout(() => fetchComparison().then(showComparison, () => showComparison(told)), LOOK_MS);
}

const connection = new Connection(show);
const quietly = () => fetchReport().then(show, () => {}); // a number on an icon is worth no error

const command = (id, icon, label, run) => ({ id: `Spillway.${id}`, icon, label, function: run });
const binding = (id, key) => ({ commandId: `Spillway.${id}`, combo: { key, alt: true, shift: true } });

app.registerExtension({
  name: "spillway.Memory",
  settings: [
    {
      id: "Spillway.Panel.Badges",
      name: "Show seconds, peaks and shares on nodes",
      tooltip:
        "A badge on each node that took time in the last run, and on loaders how much of the model stays on the GPU.",
      category: ["Spillway", "Memory panel", "Badges"],
      type: "boolean",
      defaultValue: true,
    },
    {
      id: "Spillway.Panel.Toasts",
      name: "Say when something had to give way",
      tooltip:
        "A message when a device fails and Spillway does with less, and when outputs are evicted that took long to make.",
      category: ["Spillway", "Memory panel", "Toasts"],
      type: "boolean",
      defaultValue: true,
    },
  ],
  commands: [
    command("ShowMemory", "mdi mdi-memory", "Show memory", () =>
      app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${ID}`),
    ),
    command("Forecast", "mdi mdi-crystal-ball", "Will it fit", () => actions.forecast()),
    command("FreeVRAM", "mdi mdi-eject", "Free VRAM of all models", () => actions.freeAll()),
    command("ClearCache", "mdi mdi-broom", "Clear the output cache", () => actions.clearCache()),
    command("CopyReport", "mdi mdi-content-copy", "Copy the memory report", () => actions.copy()),
    command("Compare", "mdi mdi-scale-balance", "Compare with ComfyUI", () => actions.compare()),
  ],
  keybindings: [
    binding("ShowMemory", "u"),
    binding("FreeVRAM", "v"),
    binding("ClearCache", "x"),
    binding("CopyReport", "y"),
  ],
  menuCommands: [
    {
      path: ["Extensions", "Spillway"],
      commands: ["ShowMemory", "Forecast", "FreeVRAM", "ClearCache", "CopyReport", "Compare"].map((id) => `Spillway.${id}`),
    },
  ],

  async setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./panel/panel.css", import.meta.url).href;
    await loadTexts();
    app.extensionManager.registerSidebarTab({
      id: ID,
      icon: "mdi mdi-memory",
      title: t("tab"),
      tooltip: t("title"),
      type: "custom",
      render(element) {
        state.root = document.createElement("div");
        state.root.className = "spillway-panel";
        state.root.setAttribute("role", "region");
        state.root.setAttribute("aria-label", t("title"));
        element.replaceChildren(style, state.root);
        redraw();
        connection.start();
      },
      destroy() {
        state.root = null;
        connection.stop();
      },
    });
    for (const event of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(event, () => state.root || quietly());
    quietly();
  },

  nodeCreated(node) {
    addBadge(node, {
      get report() {
        return setting("Badges") ? state.report : null;
      },
    });
  },
});
