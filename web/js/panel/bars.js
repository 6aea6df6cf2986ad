// The bars of devices and of the RAM.
import { h } from "./tree.js";
import { barInWords, limitInWords, size, sizeOf } from "./words.js";

const part = (bytes, total) => `${(100 * bytes) / (total || 1)}%`;
const label = (one, t) => one.name ?? t(`part.${one.kind}`);

/** Several models share the hue of weights in different strengths. */
function shade(parts, one) {
  const weights = parts.filter((other) => other.kind === "weights");
  const place = weights.indexOf(one);
  return place > 0 ? `--strength: ${Math.max(40, 100 - 22 * place)}%;` : "";
}

function bar(key, title, subtitle, figures, t) {
  const shown = figures.parts.filter((one) => one.bytes > 0);
  const unused = shown.every((one) => one.kind === "free");
  const peak = figures.peakAt > figures.used * 1.02 && figures.peakAt <= figures.total;
  return h(
    "div",
    { class: "sw-bar", key },
    h(
      "div",
      { class: "sw-row" },
      h("span", { class: "sw-name", title }, title, figures.device && h("small", {}, ` ${figures.device}`)),
      h("span", { class: "sw-figure" }, sizeOf(figures.used, figures.total, t)),
    ),
    h(
      "div",
      {
        class: "sw-track",
        role: "img",
        "aria-label": `${title}, ${sizeOf(figures.used, figures.total, t)}: ${barInWords(figures, t)}`,
      },
      shown.map((one) =>
        h("span", {
          class: `sw-part sw-${one.kind}`,
          style: `width: ${part(one.bytes, figures.total)};${shade(shown, one)}`,
          title: `${label(one, t)} ${size(one.bytes)}`,
        }),
      ),
      peak &&
        h("span", {
          class: "sw-peak",
          style: `left: ${part(figures.peakAt, figures.total)}`,
          title: t("peak", { size: size(figures.peak) }),
        }),
    ),
    !unused &&
      h(
        "ul",
        { class: "sw-legend", "aria-hidden": "true" },
        shown.map((one) =>
          h(
            "li",
            {},
            h("i", { class: `sw-dot sw-${one.kind}`, style: shade(shown, one) }),
            `${label(one, t)} `,
            h("b", {}, size(one.bytes)),
          ),
        ),
        figures.peak > 0 &&
          h("li", {}, h("i", { class: "sw-dot sw-peakdot" }), t("peak", { size: size(figures.peak) })),
      ),
    subtitle && h("p", { class: "sw-note" }, subtitle),
  );
}

export const deviceBar = (figures, t) => bar(figures.device, figures.name, null, figures, t);

export const ramBarView = (figures, t) => bar("ram", t("ram"), limitInWords(figures, t), figures, t);
