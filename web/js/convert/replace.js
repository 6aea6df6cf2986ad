// Puts one node of a graph in the place of another: id, values, links, title, place and colours stay.

/** The values of a node's widgets, by their names. */
export const valuesOf = (node) => Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value]));
const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links.get?.(id) ?? graph.links[id];

/** What is linked to a node: the names of its inputs and the types of its outputs. */
function usesOf(node) {
  return {
    inputs: (node.inputs ?? []).filter((input) => input.link != null).map((input) => input.name),
    outputs: (node.outputs ?? []).filter((output) => output.links?.length).map((output) => output.type),
  };
}

/** Every node of a graph and of the subgraphs in it, each graph once. */
export function allNodes(graph, seen = new Set()) {
  if (seen.has(graph)) return [];
  seen.add(graph);
  return graph.nodes.flatMap((node) => [node, ...(node.subgraph ? allNodes(node.subgraph, seen) : [])]);
}

/**
 * Replace nodes for which `choose(type, values, uses)` gives another: { done, left }. done: how many. left: the titles of
 * those that `concerns(type)` and that stay.
 */
export function convert(nodes, concerns, choose) {
  const told = { done: 0, left: [] };
  for (const node of nodes.filter((one) => concerns(one.type))) {
    const wanted = choose(node.type, valuesOf(node), usesOf(node));
    if (wanted && replace(node, wanted)) told.done += 1;
    else told.left.push(node.title);
  }
  return told;
}

/**
 * Put a node of class `type` in the place of another, with `values` of its widgets: whether that could be. names: by an
 * input's name, that of the other node.
 */
export function replace(node, { type, values, names }) {
  const { graph } = node;
  const made = globalThis.LiteGraph.createNode(type);
  if (!made || !fits(made, values)) return false;
  const into = (node.inputs ?? []).filter((input) => input.link != null).map((input) => ({
    place: made.inputs?.findIndex((one) => one.name === names[input.name]) ?? -1,
    link: { ...linkOf(graph, input.link) },
  }));
  const from = (node.outputs ?? []).flatMap((output) =>
    (output.links ?? []).map((id) => ({
      slot: made.outputs?.findIndex((one) => one.type === output.type) ?? -1,
      link: { ...linkOf(graph, id) },
    })),
  );
  // A link that the other node has no place for would be lost, such as a policy's.
  if (into.some(({ place }) => place < 0) || from.some(({ slot }) => slot < 0)) return false;
  for (const widget of made.widgets ?? []) if (widget.name in values) widget.value = values[widget.name];
  made.mode = node.mode;
  made.color = node.color;
  made.bgcolor = node.bgcolor;
  if (node.title !== node.constructor.title) made.title = node.title;
  const [{ id, pos, size, flags }, left] = [node, { into, from }];
  graph.remove(node);
  made.id = id;
  graph.add(made);
  made.pos = [...pos];
  made.size = [Math.max(size[0], made.size[0]), made.size[1]];
  made.flags = { ...flags };
  connect(graph, made, left);
  return true;
}

/** Links to what stands at the border of a subgraph are made by that border. */
function connect(graph, made, { into, from }) {
  for (const { place, link } of into) {
    if (link.origin_id === graph.inputNode?.id) graph.inputNode.slots[link.origin_slot].connect(made.inputs[place], made);
    else graph.getNodeById(link.origin_id)?.connect(link.origin_slot, made, place, link.parentId);
  }
  for (const { slot, link } of from) {
    if (link.target_id === graph.outputNode?.id) graph.outputNode.slots[link.target_slot].connect(made.outputs[slot], made);
    else made.connect(slot, graph.getNodeById(link.target_id), link.target_slot, link.parentId);
  }
}

/** Whether a node takes these values: a choice that it does not offer would be an error at the next run. */
function fits(node, values) {
  return (node.widgets ?? []).every(({ name, options }) => {
    const choices = options?.values;
    return !(name in values) || !Array.isArray(choices) || choices.includes(values[name]);
  });
}
