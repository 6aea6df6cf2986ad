// The last run and the output cache.
import { runRows } from "./figures.js";
import { spoken } from "./said.js";
import { atWork, h } from "./tree.js";
import { seconds, size, storeLine } from "./words.js";

export function runView(report, actions, t) {
  const run = runRows(report);
  if (!run) return h("p", { class: "sw-note" }, t("run.none"));
  const state = run.running
    ? t("run.now", { node: actions.nodeTitle(run.running), seconds: seconds(run.running.seconds) })
    : t("run.took", { seconds: seconds(run.seconds) });
  const most = run.peak ? t("run.most", { size: size(run.peak) }) : t("run.rss", { size: size(run.rss) });
  return [
    h("p", { class: "sw-figures" }, state, run.rows.length > 0 && ` · ${most}`),
    run.rows.length > 0 &&
      h(
        "table",
        { class: "sw-table", "aria-label": t("run.title") },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { scope: "col" }, t("run.node")),
            h("th", { scope: "col" }, t("run.seconds")),
            h("th", { scope: "col" }, run.peak ? t("run.peak") : t("run.ram")),
          ),
        ),
        h(
          "tbody",
          {},
          run.rows.map((row, index) =>
            h(
              "tr",
              { key: `${row.id} ${index}` },
              h(
                "th",
                {
                  scope: "row",
                  style: `background: linear-gradient(to right, var(--sw-rowbar) ${(100 * row.part).toFixed(1)}%, transparent 0)`,
                },
                h(
                  "button",
                  { class: "sw-link", type: "button", title: t("card.goto"), onclick: () => actions.goTo(row) },
                  actions.nodeTitle(row),
                ),
              ),
              h("td", {}, seconds(row.seconds)),
              h("td", {}, run.peak && !row.peak ? "–" : size(run.peak ? row.peak : row.rss)),
            ),
          ),
        ),
      ),
    run.hidden > 0 && h("p", { class: "sw-note" }, t("run.hidden", { count: run.hidden })),
  ];
}

export function cacheView(report, actions, t) {
  const { cache, store } = report;
  if (!cache) return h("p", { class: "sw-note" }, t("cache.theirs"));
  const { run } = cache;
  return [
    h("p", { class: "sw-figures" }, t("cache.holds", { count: cache.entries, size: size(cache.ram_bytes) })),
    h(
      "p",
      { class: "sw-note" },
      t("cache.run", {
        hits: run.hits,
        saved: seconds(run.saved_seconds),
        misses: run.misses,
        evictions: run.evictions,
      }),
    ),
    h(
      "p",
      { class: "sw-note" },
      cache.cap_bytes == null
        ? t("cache.free", { size: size(cache.headroom_bytes) })
        : t("cache.cap", { size: size(cache.headroom_bytes), cap: size(cache.cap_bytes) }),
    ),
    store && h("p", { class: "sw-note", title: store.address }, storeLine(store, t)),
    store?.state && h("p", { class: "sw-note" }, t("cache.trouble", { why: t.said(store.state).text })),
    h(
      "div",
      { class: "sw-buttons" },
      h(
        "button",
        { type: "button", ...atWork(cache.entries === 0), onclick: actions.clearCache, title: t("cache.clear.tip") },
        t("cache.clear.label"),
      ),
    ),
    cache.largest.length > 0 &&
      h(
        "details",
        { class: "sw-details" },
        h("summary", {}, t("cache.largest")),
        h(
          "ul",
          {},
          cache.largest.map((entry) =>
            h(
              "li",
              {},
              `${actions.nodeTitle({ id: entry.id, kind: entry.node })}: ${size(entry.ram_bytes)}, ${seconds(entry.seconds)}`,
            ),
          ),
        ),
      ),
    cache.decisions.length > 0 &&
      h(
        "details",
        { class: "sw-details" },
        h("summary", {}, t("cache.decisions")),
        h(
          "ul",
          {},
          [...cache.decisions]
            .reverse()
            .slice(0, 8)
            .map((text) => spoken(h, "li", text, t)),
        ),
      ),
  ];
}
