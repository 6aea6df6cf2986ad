// Draws views of made-up reports and prints what they say, as JSON: node views.mjs FOLDER OF web/js LOCALE.json
// test_views.py reads it. The views are pure, so this needs no page.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, locale] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(`${folder}/panel/${name}.js`));
const [{ panelView }, { textOf }, figures, words] = await Promise.all(["view", "tree", "figures", "words"].map(load));
const texts = JSON.parse(readFileSync(locale)).spillway;

const missing = new Set();
const asked = new Set();
const t = (key, values = {}) => {
  const text = key.split(".").reduce((found, part) => found?.[part], texts);
  asked.add(key);
  if (typeof text !== "string") missing.add(key);
  return String(text).replace(/\{(\w+)\}/g, (all, name) => values[name] ?? (missing.add(`${key}: ${all}`), all));
};
const actions = { nodeTitle: (node) => `${node.kind} #${node.id}` };

const reports = JSON.parse(readFileSync(0));
const told = reports.map((report) => ({
  text: panelView(report, actions, t, report.forecast, report.comparison).map(textOf).join("\n"),
  sum: words.summary(report, t),
  devices: figures.deviceBars(report),
  ram: figures.ramBar(report),
  cards: figures.modelCards(report).map(({ title, share, strip, inPlace }) => ({ title, share, strip, inPlace })),
  icon: figures.iconNumber(report),
  badges: ["2", "7"].map((id) => figures.nodeFigures(report, id)),
  copied: words.asText(report, t),
}));
console.log(JSON.stringify({ told, missing: [...missing], asked: [...asked] }));
