// Will it fit: what the models of the open graph will take, what could be set, and after the run what they took. Pure.
import { h } from "./tree.js";
import { HIDDEN, seconds, size, sizeOf } from "./words.js";
import { atWork, heads, row } from "./tree.js";

const STALLED = 0.01; // seconds of a step: less is not worth a row

/** What was foreseen of a node and what its last run took, side by side. null where it has not run as foreseen. */
export function factOf(report, one) {
  const node = report.run?.nodes.findLast?.((other) => other.id === one.id && other.used) ?? null;
  const told = one.forecast;
  if (!node || !told || node.used.key !== told.key) return null;
  const was = node.used;
  const time = (value) => (value == null ? "–" : seconds(value));
  const step = { told: time((told.seconds ?? told.at_least) || null), was: time(was.seconds || null) };
  const waits = told.waits != null || was.waited != null;
  return [
    { name: "stays", told: size(told.resident), was: size(was.resident) },
    { name: one.what ? "each" : "streamed", told: size(told.streamed), was: size(was.streamed) },
    ...(one.what ? [] : [{ name: "step", ...step }]),
    ...(waits && !one.what ? [{ name: "waits", told: time(told.waits), was: time(was.waited) }] : []),
    ...(was.stalled >= STALLED && !one.what ? [{ name: "stalled", told: "–", was: time(was.stalled) }] : []),
    { name: "peak", told: size(told.peak), was: was.peak == null ? "–" : size(was.peak) },
  ];
}

/** A forecast in a sentence. what: is done with the model; undefined where it samples, which has steps. */
export function inWords(told, t, what) {
  const all = { total: size(told.total), stays: sizeOf(told.resident, told.total, t), streamed: size(told.streamed) };
  const stays = t(told.streamed ? (what ? "forecast.part_use" : "forecast.part") : "forecast.all", all);
  const least = told.streamed ? stepInWords(told, t) : "";
  const peak = t(told.fits ? "forecast.fits" : "forecast.over", { peak: sizeOf(told.peak, told.device_total, t) });
  return `${stays}${least} ${peak}${told.tiled ? t("forecast.tiled") : ""}`;
}

/** How long a step takes: as one was seen or is expected to, with its waits, or else the least that it can. */
function stepInWords(told, t) {
  if (told.seconds && told.waits > HIDDEN * told.seconds)
    return t("forecast.waits", { seconds: seconds(told.seconds), wait: seconds(told.waits) });
  if (told.seconds) return t("forecast.takes", { seconds: seconds(told.seconds) });
  return told.at_least ? t("forecast.least", { seconds: seconds(told.at_least) }) : "";
}

function wayView(way, one, actions, t) {
  const node = actions.nodeTitle(way);
  const set = way.swap
    ? { words: t("forecast.swap", { kind: way.swap }), tip: t("forecast.swap_tip", { kind: way.swap, node }) }
    : { words: t("forecast.set", { widget: way.widget, value: way.value }), tip: t("forecast.set_tip", { node }) };
  const why = t(`forecast.way.${way.code}`, { tile: way.values?.tile_size });
  return h(
    "li",
    { class: "sw-way", key: `${way.id} ${set.words}` },
    h("button", { type: "button", onclick: () => actions.setWay(way), title: set.tip }, set.words),
    h("span", { class: "sw-note" }, ` ${why}: ${inWords(way.forecast, t, one.what)}`),
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

function nodeView(one, report, actions, t) {
  const { forecast: told, what } = one;
  const facts = factOf(report, one);
  const quiet = told && !told.order_known && "guessed";
  const notes = [
    ...one.notes.map((note) => t(`forecast.note.${note.code}`, note.words ? { ...note, words: t.said(note.words).text } : note)),
    ...(told && (told.learnt || told.computation) ? [t(`forecast.known.${told.learnt ? "learnt" : "estimate"}`)] : []),
    ...(quiet ? [t("forecast.known.order")] : []),
  ];
  return h(
    "article",
    { class: "sw-card", key: `${one.what ?? "sample"} ${one.id}`, "aria-label": actions.nodeTitle(one) },
    h(
      "p",
      { class: "sw-row" },
      h(
        "button",
        { class: "sw-link sw-name", type: "button", title: t("card.goto"), onclick: () => actions.goTo(one) },
        actions.nodeTitle(one),
      ),
      told && h("small", {}, [what && t(`forecast.what.${what}`), told.name, told.format].filter(Boolean).join(" · ")),
    ),
    told && h("p", { class: "sw-figures" }, inWords(told, t, what)),
    ...notes.map((text, index) => h("p", { class: "sw-note", key: `note ${index}` }, text)),
    one.ways.length > 0 && h("ul", { key: "ways" }, ...one.ways.map((way) => wayView(way, one, actions, t))),
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
    ...[...(told?.samplers ?? []), ...(told?.uses ?? [])].map((one) => nodeView(one, report, actions, t)),
    told?.left_out > 0 && h("p", { class: "sw-note", key: "left" }, t("forecast.left", { count: told.left_out })),
  ];
}
