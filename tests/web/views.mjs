// Draws views of made-up reports and prints what they say, as JSON: node views.mjs FOLDER OF web/js LOCALE.json
// test_views.py reads it. The views are pure, so this needs no page.
import { readFileSync } from "node:fs";
import { dirname } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, locale] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(`${folder}/panel/${name}.js`));
const names = ["view", "tree", "figures", "words", "said"];
const [{ panelView }, { textOf }, figures, words, { tellerOf }] = await Promise.all(names.map(load));
const texts = JSON.parse(readFileSync(locale)).spillway;
const english = JSON.parse(readFileSync(`${dirname(locale)}/../en/main.json`)).spillway;

const missing = new Set();
const asked = new Set();
const t = (key, values = {}) => {
  const text = key.split(".").reduce((found, part) => found?.[part], texts);
  asked.add(key);
  if (typeof text !== "string") missing.add(key);
  return String(text).replace(/\{(\w+)\}/g, (all, name) => values[name] ?? (missing.add(`${key}: ${all}`), all));
};
t.said = tellerOf(english, texts);
const actions = { nodeTitle: (node) => `${node.kind} #${node.id}` };

const inEnglish = (tree) =>
  typeof tree !== "object" ? [] : tree.props.lang === "en" ? [textOf(tree)] : tree.children.flatMap(inEnglish);
const reports = JSON.parse(readFileSync(0));
const told = reports.map((report) => ({
  text: panelView(report, actions, t, report.forecast, report.comparison).map(textOf).join("\n"),
  english: panelView(report, actions, t, report.forecast, report.comparison).flatMap(inEnglish),
  sum: words.summary(report, t),
  devices: figures.deviceBars(report),
  ram: figures.ramBar(report),
  cards: figures.modelCards(report).map(({ title, share, strip, inPlace }) => ({ title, share, strip, inPlace })),
  icon: figures.iconNumber(report),
  badges: ["2", "7"].map((id) => figures.nodeFigures(report, id)),
  copied: words.asText(report, t),
}));
console.log(JSON.stringify({ told, missing: [...missing], asked: [...asked] }));
