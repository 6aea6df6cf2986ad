// The whole panel as a tree. Pure: a report, what the buttons do, and the texts go in.
import { deviceBar, ramBarView } from "./bars.js";
import { cardView } from "./cards.js";
import { compareView } from "./compare.js";
import { deviceBars, modelCards, ramBar } from "./figures.js";
import { forecastView } from "./forecast.js";
import { cacheView, runView } from "./sections.js";
import { h } from "./tree.js";
import { comingLine, summary } from "./words.js";

const section = (name, t, ...children) =>
  h(
    "section",
    { class: "sw-section", key: name, "aria-labelledby": `sw-${name}` },
    h("h3", { id: `sw-${name}` }, t(`${name}.title`)),
    ...children,
  );

/**
 * forecast: what was asked for before a run. comparison: the last one with ComfyUI. Both may be null. said: what a screen
 * reader is to say now. The sentence that sums up changes several times a second, which nobody could listen to.
 */
export function panelView(report, actions, t, forecast = null, comparison = null, said = "") {
  if (!report) return [h("p", { class: "sw-sum", role: "status", key: "sum" }, t("wait"))];
  const cards = modelCards(report);
  return [
    h("p", { class: "sw-sum", key: "sum" }, summary(report, t)),
    h("p", { class: "sw-said", role: "status", key: "said" }, said),
    section(
      "memory",
      t,
      deviceBars(report).map((figures) => deviceBar(figures, t)),
      ramBarView(ramBar(report), t),
    ),
    section(
      "models",
      t,
      cards.length > 1 &&
        h(
          "div",
          { class: "sw-buttons", key: "all" },
          h(
            "button",
            { type: "button", onclick: actions.freeAll, title: t("models.free.tip") },
            t("models.free.label"),
          ),
        ),
      cards.map((card) => cardView(card, actions, t)),
      (report.coming ?? []).map((file, index) =>
        h("p", { class: "sw-note", key: `coming ${index} ${file.address}`, title: file.address }, comingLine(file, t)),
      ),
      !cards.length && h("p", { class: "sw-note", key: "none" }, t("models.none")),
    ),
    section("forecast", t, forecastView(forecast, report, actions, t)),
    section("run", t, runView(report, actions, t)),
    section("cache", t, cacheView(report, actions, t)),
    section("compare", t, compareView(comparison, actions, t)),
    h(
      "footer",
      { class: "sw-buttons", key: "foot" },
      h("button", { type: "button", onclick: actions.copy, title: t("copy.tip") }, t("copy.label")),
    ),
  ];
}
