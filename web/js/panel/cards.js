// A card for each model: where its layers lie, what a step brings, what was decided, and what can be pressed.
import { layerAt } from "./figures.js";
import { spoken } from "./said.js";
import { h } from "./tree.js";
import { perStep, seconds, size, sizeOf, waiting } from "./words.js";

const GB = 2 ** 30;

/** `actions`: free(card), drop(card), keep(card, on), limit(card, bytes or null), goTo(node), nodeTitle(node). */
export function cardView(card, actions, t) {
  const where = card.node && actions.nodeTitle(card.node);
  const place = t(`place.${card.onCpu ? "ram" : "resident"}`);
  return h(
    "article",
    {
      class: `sw-card${card.running ? " sw-live" : ""}`,
      key: `model ${card.id ?? `${card.name} ${card.device}`}`,
      "aria-label": card.title,
    },
    h(
      "header",
      { class: "sw-row" },
      h("span", { class: "sw-name", title: card.file || card.name }, card.title),
      card.running && h("span", { class: "sw-chip sw-on" }, t("card.running")),
      !card.ours && h("span", { class: "sw-chip" }, "ComfyUI"),
    ),
    h(
      "div",
      { class: "sw-row sw-note" },
      h("span", {}, [card.title !== card.name && card.name, card.format, card.device].filter(Boolean).join(" · ")),
      where &&
        h(
          "button",
          { class: "sw-link", type: "button", title: t("card.goto"), onclick: () => actions.goTo(card.node) },
          `${where} →`,
        ),
    ),
    card.layers.length > 0 && stripView(card, t),
    h(
      "p",
      { class: "sw-figures" },
      h("span", { class: "sw-piece" }, h("b", {}, card.share > 0.995 ? size(card.total) : sizeOf(card.resident, card.total, t)), ` ${place}`),
      stepWords(card, t).map((words) => [" · ", h("span", { class: "sw-piece" }, words)]),
    ),
    card.ours && buttons(card, actions, t),
    card.decisions.length > 0 &&
      h(
        "details",
        { class: "sw-details" },
        h("summary", {}, t("card.decisions")),
        h(
          "ul",
          {},
          [...card.decisions].reverse().map((text) => spoken(h, "li", text, t)),
        ),
      ),
  );
}

/** What a step takes, in pieces that a line is not broken within. */
function stepWords(card, t) {
  if (!card.ours || !card.steps) return [];
  const brought = perStep(card);
  const wait = waiting(card);
  const waits = typeof wait === "number" ? ` (${t("card.waits", { seconds: seconds(wait) })})` : "";
  const timed = card.samples && card.step.seconds > 0;
  return [
    brought > 0 && t(card.samples ? "card.step" : "card.use", { size: size(brought) }),
    timed && `${t("card.seconds", { seconds: seconds(card.step.seconds) })}${waits}`,
  ].filter(Boolean);
}

function stripView(card, t) {
  const stops = card.strip.map(
    ({ place, from, to }) => `var(--sw-${place}) ${(100 * from).toFixed(2)}% ${(100 * to).toFixed(2)}%`,
  );
  const words = ["resident", "pinned", "file"]
    .map((place) => [place, card.inPlace[place]])
    .filter(([, bytes]) => bytes > 0);
  const name = (place) => t(`place.${place === "resident" && card.onCpu ? "ram" : place}`);
  const said = words.map(([place, bytes]) => `${name(place)} ${size(bytes)}`).join(", ");
  return [
    h("div", {
      class: "sw-strip",
      role: "img",
      "aria-label": `${t("card.strip")}: ${said}`,
      style: `background: linear-gradient(to right, ${stops.join(", ")})`,
      onpointermove: (event) => {
        const box = event.currentTarget.getBoundingClientRect();
        const layer = layerAt(card, (event.clientX - box.left) / box.width);
        event.currentTarget.title = layer ? `${layer.name}: ${size(layer.bytes)}, ${name(layer.place)}` : "";
      },
    }),
    h(
      "ul",
      { class: "sw-legend", "aria-hidden": "true" },
      words.map(([place, bytes]) =>
        h("li", {}, h("i", { class: `sw-dot sw-at-${place}` }), `${name(place)} `, h("b", {}, size(bytes))),
      ),
    ),
  ];
}

function buttons(card, actions, t) {
  const kept = card.keep === "always";
  const onCard = !card.onCpu;
  const set = (event) => {
    event.preventDefault();
    const given = Number.parseFloat(event.currentTarget.elements.gb.value);
    if (given >= 0) actions.limit(card, Math.round(given * GB));
  };
  return [
    h(
      "div",
      { class: "sw-buttons" },
      h(
        "button",
        { type: "button", onclick: () => actions.free(card), title: t(onCard ? "card.free.tip" : "card.free.tipcpu") },
        t(onCard ? "card.free.label" : "card.freecpu"),
      ),
      h(
        "button",
        { type: "button", onclick: () => actions.drop(card), title: t("card.drop.tip") },
        t("card.drop.label"),
      ),
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(kept),
          onclick: () => actions.keep(card, !kept),
          title: t("card.keep.tip"),
        },
        t("card.keep.label"),
      ),
      limitForm(card, set, actions, t),
    ),
  ];
}

function limitForm(card, set, actions, t) {
  const limited = card.limit !== null && card.limit !== undefined;
  const id = `sw-limit-${card.id}`;
  return h(
    "details",
    { class: "sw-limit" },
    h(
      "summary",
      { title: t("card.limit.tip") },
      limited ? t("card.limit.now", { size: size(card.limit) }) : t("card.limit.none"),
    ),
    h(
      "form",
      { class: "sw-form", onsubmit: set },
      h("label", { for: id }, t("card.limit.label")),
      h("input", {
        id,
        name: "gb",
        type: "number",
        min: "0",
        step: "any",
        required: true,
        placeholder: (card.total / GB).toFixed(1),
      }),
      h("button", { type: "submit" }, t("card.limit.set")),
      card.chosen.includes("vram_bytes") &&
        h("button", { type: "button", onclick: () => actions.limit(card, null) }, t("card.limit.clear")),
    ),
  );
}
