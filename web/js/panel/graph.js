// Nodes of the open graph: their titles, a way to them, and their badges.
import { app } from "../../../../scripts/app.js";
import { replace, valuesOf } from "../convert/replace.js";
import { nodeFigures } from "./figures.js";
import { percent, seconds, size } from "./words.js";

/** Find a node by the id that the server knows, "12" or "3:12" for node 12 of the subgraph in node 3: (node, graph). */
function find(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    graph = node ? node.subgraph : graph;
    node = graph?.getNodeById?.(Number(part)) ?? graph?.getNodeById?.(part) ?? null;
    if (!node) return null;
  }
  return { node, graph };
}

/** The title of a node that the server names, or its class where the open graph has another node under that id. */
export function nodeTitle({ id, kind }) {
  const found = find(id);
  return found && found.node.type === kind ? `${found.node.title} #${id}` : kind;
}

/** Show a node of the open graph, and select it. Returns false where the graph has it not. */
export function goTo({ id, kind }) {
  const found = find(id);
  if (!found || found.node.type !== kind) return false;
  const { canvas } = app;
  if (canvas.graph !== found.graph) canvas.setGraph?.(found.graph);
  canvas.centerOnNode(found.node);
  canvas.selectNode?.(found.node);
  canvas.setDirty?.(true, true);
  return true;
}

/** Set a widget of a node, so that ComfyUI's undo takes it back. Returns { value } of before; null where it is gone. */
export function setWidget({ id, kind }, name, value) {
  const found = find(id);
  const widget = found?.node.type === kind && found.node.widgets?.find((one) => one.name === name);
  if (!widget) return null;
  const before = { value: widget.value };
  widget.value = value;
  widget.callback?.(value, app.canvas, found.node);
  found.node.onWidgetChanged?.(name, value, before.value, widget);
  changed();
  return before;
}

/** Put a node of another class in the place of one with the same wires: as `setWidget`, with { values } of before. */
export function swapNode({ id, kind }, type, values) {
  const found = find(id);
  if (found?.node.type !== kind) return null;
  const before = { values: valuesOf(found.node) };
  const names = Object.fromEntries((found.node.inputs ?? []).map(({ name }) => [name, name]));
  if (!replace(found.node, { type, values, names })) return null;
  changed();
  return before;
}

function changed() {
  app.canvas?.setDirty?.(true, true);
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
}

function idOf(node) {
  const graph = app.rootGraph ?? app.graph;
  return node.graph && node.graph !== graph ? null : String(node.id);
}

/** Give a node a badge. `state.report` is asked at each draw of the graph; no report or nothing to say hides it. */
export function addBadge(node, state) {
  const Badge = globalThis.LGraphBadge;
  if (!Badge || !Array.isArray(node.badges)) return;
  let known = { report: null, badge: null };
  node.badges.push(() => {
    const { report } = state;
    if (known.report !== report)
      known = { report, badge: new Badge({ text: words(node, report), fgColor: "#e8eaf0", bgColor: "#31584a" }) };
    return known.badge ?? new Badge({ text: "" });
  });
}

function words(node, report) {
  const id = report && idOf(node);
  const figures = id && nodeFigures(report, id);
  if (!figures) return "";
  if (figures.share !== undefined) return `GPU ${percent(figures.share)}`;
  return figures.peak ? `${seconds(figures.seconds)} · ${size(figures.peak)}` : seconds(figures.seconds);
}
