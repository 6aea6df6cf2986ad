// One graph through ComfyUI's loaders and through Spillway's: what each run took. Pure.
import { atWork, h, heads, row } from "./tree.js";
import { seconds, size } from "./words.js";

const KINDS = ["ComfyUI", "Spillway"];
const SHOWN = ["pictures", "sounds", "latents"];

function rowsOf(runs, t) {
  const devices = [...new Set(runs.flatMap((run) => Object.keys(run.peaks)))].sort();
  const one = (name, write) => [name, ...runs.map(write)];
  return [
    one(t("compare.seconds"), (run) => seconds(run.seconds)),
    one(t("compare.rss"), (run) => size(run.rss)),
    ...devices.map((device) => one(t("compare.device", { device }), (run) => size(run.peaks[device] ?? 0))),
  ];
}

/** Whether what both runs show is equal, a sentence for each kind of it. */
function shownInWords(shown, t) {
  const kinds = SHOWN.filter((kind) => shown?.[kind]?.count);
  const words = kinds.map((kind) => kindInWords(kind, shown[kind], t));
  return words.length ? words : [t("compare.none")];
}

function kindInWords(kind, { count, frames, equal, most, other }, t) {
  const what = t(`compare.kind.${kind}`);
  if (count === equal) return t(kind === "pictures" && frames > count ? "compare.frames" : "compare.equal", { what, count, frames });
  const by = t(`compare.by.${kind}`, { most: Number(most.toPrecision(3)) });
  const ends = [equal + other < count && t("compare.differ", { by }), other > 0 && t("compare.other", { count: other })];
  return t("compare.some", { what, count, equal, ends: ends.filter(Boolean).join("; ") });
}

function table(runs, t) {
  return h(
    "table",
    { class: "sw-table", key: "runs", "aria-label": t("compare.title") },
    h("thead", {}, heads(...KINDS)),
    h("tbody", {}, ...rowsOf(runs, t).map((texts) => row(...texts))),
  );
}

/** What came of a comparison, for who does not see the table. */
export function comparisonInWords(told, t) {
  if (told.state === "runs") return t("compare.runs");
  return told.state === "done" ? shownInWords(told.shown, t).join(" ") : t("compare.ended", { why: t.said(told.state).text });
}

/** told: what GET /spillway/compare says, or null. */
export function compareView(told, actions, t) {
  const runs = told?.runs ? KINDS.map((kind) => told.runs[kind]) : [];
  const busy = told?.state === "runs";
  const done = told?.state === "done";
  return [
    h(
      "div",
      { class: "sw-buttons", key: "ask" },
      h(
        "button",
        { type: "button", ...atWork(busy), onclick: actions.compare, title: t("compare.tip") },
        t(busy ? "compare.runs" : "compare.ask"),
      ),
      told?.text && h("button", { type: "button", key: "copy", onclick: actions.copyComparison }, t("compare.copy")),
    ),
    done && table(runs, t),
    done && shownInWords(told.shown, t).map((words, index) => h("p", { class: "sw-figures", key: `shown ${index}` }, words)),
    done &&
      told.shown?.left?.length > 0 &&
      h("p", { class: "sw-note", key: "left" }, t("compare.left", { names: told.shown.left.join(", ") })),
    done &&
      told.same.length > 0 &&
      h("p", { class: "sw-note", key: "same" }, t("compare.same", { names: told.same.join(", ") })),
    done && told.kept.length > 0 && h("p", { class: "sw-note", key: "kept" }, t("compare.kept", { names: told.kept.join(", ") })),
    !done && !busy && told?.runs && h("p", { class: "sw-note", key: "why" }, t("compare.ended", { why: t.said(told.state).text })),
  ];
}
