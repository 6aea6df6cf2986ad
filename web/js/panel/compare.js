// One graph through ComfyUI's loaders and through Spillway's: what each run took. Pure.
import { h } from "./tree.js";
import { seconds, size } from "./words.js";

const KINDS = ["ComfyUI", "Spillway"];

function rowsOf(runs, t) {
  const devices = [...new Set(runs.flatMap((run) => Object.keys(run.peaks)))].sort();
  const row = (name, write) => [name, ...runs.map(write)];
  return [
    row(t("compare.seconds"), (run) => seconds(run.seconds)),
    row(t("compare.rss"), (run) => size(run.rss)),
    ...devices.map((device) => row(t("compare.device", { device }), (run) => size(run.peaks[device] ?? 0))),
  ];
}

function picturesInWords({ count, equal, most }, t) {
  if (!count) return t("compare.none");
  return count === equal ? t("compare.equal", { count }) : t("compare.differ", { count, equal, most });
}

function table(runs, t) {
  const cells = (tag, texts) =>
    h("tr", {}, ...texts.map((text) => h(tag, tag === "th" ? { scope: "col" } : {}, text)));
  return h(
    "table",
    { class: "sw-table", key: "runs" },
    h("thead", {}, cells("th", ["", ...KINDS])),
    h("tbody", {}, ...rowsOf(runs, t).map((row) => cells("td", row))),
  );
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
        { type: "button", disabled: busy, onclick: actions.compare, title: t("compare.tip") },
        t(busy ? "compare.runs" : "compare.ask"),
      ),
      done && h("button", { type: "button", key: "copy", onclick: actions.copyComparison }, t("compare.copy")),
    ),
    done && table(runs, t),
    done && h("p", { class: "sw-figures", key: "pictures" }, picturesInWords(told.pictures ?? {}, t)),
    done &&
      told.same.length > 0 &&
      h("p", { class: "sw-note", key: "same" }, t("compare.same", { names: told.same.join(", ") })),
    done && told.kept.length > 0 && h("p", { class: "sw-note", key: "kept" }, t("compare.kept", { names: told.kept.join(", ") })),
    !done && !busy && told?.runs && h("p", { class: "sw-note", key: "why" }, t("compare.ended", { why: told.state })),
  ];
}
