// A workflow in API format with ComfyUI's loaders in the place of Spillway's. Pure.
import { isOurs, toTheirs } from "./loaders.js";

const OUTPUTS = { SpillwayLoadCheckpoint: ["MODEL", "CLIP", "VAE", "CLIP_VISION"] };
const isLink = (value) => Array.isArray(value);

/** The workflow. What ComfyUI has nothing like stays; the server names it. */
export function withTheirs(prompt) {
  const made = {};
  for (const [id, node] of Object.entries(prompt)) {
    const wanted = isOurs(node.class_type) ? toTheirs(node.class_type, node.inputs, usesOf(prompt, id)) : null;
    // A policy says what Spillway may take. ComfyUI's loaders have none.
    made[id] = wanted ? { ...node, class_type: wanted.type, inputs: wanted.values } : node;
  }
  return made;
}

function usesOf(prompt, id) {
  const node = prompt[id];
  const slots = Object.values(prompt).flatMap((other) =>
    Object.values(other.inputs).filter((value) => isLink(value) && String(value[0]) === id).map((value) => value[1]),
  );
  const names = OUTPUTS[node.class_type] ?? [];
  return {
    inputs: Object.keys(node.inputs).filter((name) => isLink(node.inputs[name])),
    outputs: slots.map((slot) => names[slot]),
  };
}
