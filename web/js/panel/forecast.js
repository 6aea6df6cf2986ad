// Will it fit: what the samplers of the open graph will take, what could be set, and after the run what they took. Pure.
import { h } from "./tree.js";
import { seconds, size, sizeOf } from "./words.js";
import { atWork, heads, row } from "./tree.js";

/** What was foreseen of a sampler and what its last run took, side by side. null where it has not run as foreseen. */
export function factOf(report, sampler) {
  const node = report.run?.nodes.findLast?.((one) => one.id === sampler.id && one.sampled) ?? null;
  const told = sampler.forecast;
  if (!node || !told || node.sampled.key !== told.key) return null;
  const was = node.sampled;
  return [
    { name: "stays", told: size(told.resident), was: size(was.resident) },
    { name: "streamed", told: size(told.streamed), was: size(was.streamed) },
    { name: "step", told: told.at_least ? seconds(told.at_least) : "–", was: was.seconds ? seconds(was.seconds) : "–" },
    { name: "peak", told: size(told.peak), was: was.peak == null ? "–" : size(was.peak) },
  ];
}

/** A forecast in a sentence. */
export function inWords(told, t) {
  const all = { total: size(told.total), stays: sizeOf(told.resident, told.total, t), streamed: size(told.streamed) };
  const stays = t(told.streamed ? "forecast.part" : "forecast.all", all);
  const least = told.streamed && told.at_least ? t("forecast.least", { seconds: seconds(told.at_least) }) : "";
  const peak = t(told.fits ? "forecast.fits" : "forecast.over", { peak: sizeOf(told.peak, told.device_total, t) });
  return `${stays}${least} ${peak}`;
}

function wayView(way, sampler, actions, t) {
  const set = t("forecast.set", { widget: way.widget, value: way.value });
  return h(
    "li",
    { class: "sw-way", key: `${way.id} ${way.widget} ${way.value}` },
    h(
      "button",
      { type: "button", onclick: () => actions.setWay(way), title: t("forecast.set_tip", { node: actions.nodeTitle(way) }) },
      set,
    ),
    h("span", { class: "sw-note" }, ` ${t(`forecast.way.${way.code}`)}: ${inWords(way.forecast, t)}`),
  );
}

function factsView(rows, t) {
  return h(
    "table",
    { class: "sw-table", key: "facts", "aria-label": t("forecast.title") },
    h("thead", {}, heads(t("forecast.told"), t("forecast.was"))),
    h("tbody", {}, ...rows.map((one) => row(t(`forecast.row.${one.name}`), one.told, one.was))),
  );
}

function samplerView(sampler, report, actions, t) {
  const { forecast: told } = sampler;
  const facts = factOf(report, sampler);
  const quiet = told && !told.order_known && "guessed";
  const notes = [
    ...sampler.notes.map((note) => t(`forecast.note.${note.code}`, note)),
    ...(told ? [t(`forecast.known.${told.seen || told.learnt ? "learnt" : "estimate"}`)] : []),
    ...(quiet ? [t("forecast.known.order")] : []),
  ];
  return h(
    "article",
    { class: "sw-card", key: sampler.id, "aria-label": actions.nodeTitle(sampler) },
    h(
      "p",
      { class: "sw-row" },
      h(
        "button",
        { class: "sw-link sw-name", type: "button", title: t("card.goto"), onclick: () => actions.goTo(sampler) },
        actions.nodeTitle(sampler),
      ),
      told && h("small", {}, `${told.name} · ${told.format}`),
    ),
    told && h("p", { class: "sw-figures" }, inWords(told, t)),
    ...notes.map((text, index) => h("p", { class: "sw-note", key: `note ${index}` }, text)),
    sampler.ways.length > 0 && h("ul", { key: "ways" }, ...sampler.ways.map((way) => wayView(way, sampler, actions, t))),
    facts && factsView(facts, t),
  );
}

/** state: { busy, told, undo }, as memory.js keeps it. */
export function forecastView(state, report, actions, t) {
  const told = state?.told;
  return [
    h(
      "div",
      { class: "sw-buttons", key: "ask" },
      h(
        "button",
        { type: "button", ...atWork(state?.busy), onclick: actions.forecast, title: t("forecast.ask_tip") },
        t(state?.busy ? "forecast.busy" : "forecast.ask"),
      ),
      state?.undo &&
        h("button", { type: "button", key: "undo", onclick: actions.undoWay, title: t("forecast.undo_tip") }, t("forecast.undo")),
    ),
    told && told.samplers.length === 0 && h("p", { class: "sw-note", key: "none" }, t("forecast.none")),
    ...(told?.samplers ?? []).map((sampler) => samplerView(sampler, report, actions, t)),
    told?.left_out > 0 && h("p", { class: "sw-note", key: "left" }, t("forecast.left", { count: told.left_out })),
  ];
}
