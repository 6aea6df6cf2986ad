// What the server says in English, in the language of the panel: texts with {places}, found again and filled anew. Pure.

const LONGEST = 1500; // of an error's words, too: more is left as it is
const MOST = 1000; // sentences that are remembered
const DEEPEST = 6;
// A place of these names holds no list of things, so it ends before what parts them.
const SHORT = /^(count|seconds|part|speed|device|dtype)\d*$/;
const SIZE = /^size\d*$/;

const quoted = (text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");

/** A text with {places} as a pattern: how many letters it has beside them, and what stands in its stead. */
function pattern(text, instead) {
  const names = [];
  const parts = text.split(/\{(\w+)\}/).map((part, index) => {
    if (index % 2 === 0) return quoted(part);
    names.push(part);
    if (SIZE.test(part)) return "(-?[\\d.]+ [KMG]?i?B)";
    return SHORT.test(part) ? "([^,;]*?)" : "(.*?)";
  });
  const letters = text.replace(/\{\w+\}/g, "").length;
  return { expression: new RegExp(`^${parts.join("")}$`, "s"), names, letters, instead };
}

/**
 * Make a function that gives a sentence of the server in another language, as { text, known }.
 * english, theirs: texts by key, the same keys in both. commas: what parts things of a list in that language.
 */
export function teller(english, theirs, commas = {}) {
  const patterns = Object.entries(english ?? {})
    .map(([key, text]) => pattern(text, theirs?.[key] ?? text))
    .sort((a, b) => b.letters - a.letters);
  const remembered = new Map();

  /** The best way to say a text: { text, left } with the letters that nobody translated; null where none is known. */
  function whole(text, depth) {
    let best = null;
    for (const { expression, names, instead } of patterns) {
      const found = expression.exec(text);
      if (!found) continue;
      const values = names.map((_, index) => part(found[index + 1], depth + 1));
      const left = values.reduce((sum, value) => sum + value.left, 0);
      if (best && best.left <= left) continue;
      const told = Object.fromEntries(names.map((name, index) => [name, values[index].text]));
      best = { text: instead.replace(/\{(\w+)\}/g, (all, name) => told[name] ?? all), left };
    }
    return best;
  }

  /** What stands in a place, or the whole: a sentence too, or a list of such, or a name or size that stays. */
  function part(text, depth) {
    const found = depth < DEEPEST ? whole(text, depth) : null;
    if (found && !text.includes(". ")) return { ...found, known: true };
    const between = depth < DEEPEST && [". ", "; ", ", "].find((one) => text.includes(one));
    const said = between ? text.split(between).map((piece) => part(piece, depth + 1)) : [];
    const left = said.reduce((sum, piece) => sum + piece.left, 0);
    if (found && (found.left <= left || !said.length)) return { ...found, known: true };
    if (!said.some(({ known }) => known)) return { text, left: text.length, known: false };
    return { text: said.map((piece) => piece.text).join(commas[between] ?? between), left, known: true };
  }

  return (given) => {
    const text = String(given ?? ""); // an error of another pack may be no Error
    if (!remembered.has(text)) {
      if (remembered.size >= MOST) remembered.clear();
      const found = text.length <= LONGEST ? part(text, 0) : { text, known: false };
      remembered.set(text, { text: found.text, known: found.known });
    }
    return remembered.get(text);
  };
}

const flat = (table, above = "") =>
  Object.entries(table ?? {}).flatMap(([key, text]) =>
    typeof text === "string" ? [[above + key, text]] : flat(text, `${above}${key}.`),
  );

/** The teller of two languages' texts, as the locales have them. */
export function tellerOf(english, theirs) {
  const { list } = theirs ?? english;
  const [from, to] = [english, theirs].map((texts) => Object.fromEntries(flat(texts?.said)));
  return teller(from, to, { ", ": list?.comma, "; ": list?.semicolon, ". ": list?.stop });
}

/** What the server said, as a child of a view, marked as English where nobody translated it. */
export function spoken(h, tag, text, t) {
  const { text: words, known } = t.said(text);
  return h(tag, known ? {} : { lang: "en" }, words);
}
