// Draws plain trees: a view is a function that returns one, and `draw` changes of the page only what differs.
// So the focus, open details and half-typed numbers survive every update.

/** A node of a tree. Children may be nested lists; null and false are left out. `key` names a node among its siblings. */
export function h(tag, props, ...children) {
  const { key, ...rest } = props ?? {};
  return {
    tag,
    key,
    props: rest,
    children: children.flat(Infinity).filter((child) => child != null && child !== false),
  };
}

/** Properties of a button that is at work: it stays where the keyboard is, as one that is disabled would not. */
export const atWork = (busy) => ({ "aria-disabled": busy ? "true" : null });

/** A row of a table whose first cell names it. */
export const row = (name, ...texts) =>
  h("tr", {}, h("th", { scope: "row" }, name), ...texts.map((text) => h("td", {}, text)));

/** The row above all others. The first column has no name. */
export const heads = (...texts) => h("tr", {}, h("td", {}), ...texts.map((text) => h("th", { scope: "col" }, text)));

/** All text of a tree, for tests and screen readers. */
export function textOf(tree) {
  return typeof tree === "object" ? tree.children.map(textOf).join(" ") : String(tree);
}

/** Make the children of an element those of a tree. */
export function draw(parent, trees) {
  const known = new Map();
  for (const child of parent.childNodes) if (child.spillwayKey !== undefined) known.set(child.spillwayKey, child);
  let place = parent.firstChild;
  for (const tree of [trees].flat()) {
    const node = fitting(known, place, tree);
    if (node === place) place = place.nextSibling;
    else parent.insertBefore(node, place);
    if (typeof tree === "object") fill(node, tree);
    else if (node.data !== String(tree)) node.data = String(tree);
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

function fitting(known, place, tree) {
  if (typeof tree !== "object") return place?.nodeType === 3 ? place : document.createTextNode("");
  if (tree.key !== undefined && known.has(tree.key)) return known.get(tree.key);
  const same = place?.localName === tree.tag && place.spillwayKey === tree.key;
  if (same) return place;
  const made = document.createElement(tree.tag);
  made.spillwayKey = tree.key;
  return made;
}

function fill(node, tree) {
  const before = node.spillwayProps ?? {};
  for (const name of Object.keys(before)) if (!(name in tree.props)) set(node, name, null);
  for (const [name, value] of Object.entries(tree.props)) if (before[name] !== value) set(node, name, value);
  node.spillwayProps = tree.props;
  draw(node, tree.children);
}

function set(node, name, value) {
  if (name.startsWith("on")) node[name] = value;
  else if (value == null || value === false) node.removeAttribute(name);
  else node.setAttribute(name, value === true ? "" : value);
}
