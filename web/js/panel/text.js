// The panel's texts, in the language that ComfyUI is set to. The server has them from locales/*/main.json.
import { api } from "../../../../scripts/api.js";
import { app } from "../../../../scripts/app.js";
import { tellerOf } from "./said.js";

let tables = {};
let loading = null;
const tellers = {}; // of what the server says, by language

/** Fetch the texts, once. Call it before anything is drawn. */
export const loadTexts = () => (loading ??= fetchTexts());

async function fetchTexts() {
  try {
    tables = await (await api.fetchApi("/i18n")).json();
  } catch (error) {
    console.warn("[Spillway] the panel's texts did not come", error);
  }
}

/** Make a function that gives the text of a key, with {names} replaced by values. */
export function translator(table, fallback) {
  const find = (texts, key) => key.split(".").reduce((found, part) => found?.[part], texts);
  return (key, values = {}) => {
    const text = find(table, key) ?? find(fallback, key) ?? key;
    return typeof text === "string" ? text.replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all) : key;
  };
}

export function language() {
  return app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
}

/** The text of a key in the user's language, or else in English. `t.said` gives a sentence of the server, as `teller`. */
export const t = (key, values) => translator(tables[language()]?.spillway, tables.en?.spillway)(key, values);
t.said = (text) => {
  const found = language();
  if (!tables.en) return { text, known: false };
  return (tellers[found] ??= tellerOf(tables.en.spillway, tables[found]?.spillway))(text);
};

/** The same in English, for texts that go to others. */
export const inEnglish = (key, values) => translator(tables.en?.spillway, {})(key, values);
inEnglish.said = (text) => ({ text, known: true });
