// Converts loaders and workflows there and back and prints what came of it, as JSON: node loaders.mjs FOLDER OF web/js
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const load = (name) => import(pathToFileURL(`${process.argv[2]}/convert/${name}.js`));
const [{ toOurs, toTheirs }, { withTheirs }] = await Promise.all(["loaders", "prompt"].map(load));
const { loaders, back, prompts } = JSON.parse(readFileSync(0));
const there = loaders.map(([type, values]) => toOurs(type, values));
const again = there.map((ours, index) => ours && toTheirs(ours.type, ours.values, usesOf(loaders[index][0])));
const usesFor = (uses) => ({ inputs: [], outputs: [], ...uses });

function usesOf(type) {
  const vision = ["unCLIPCheckpointLoader", "ImageOnlyCheckpointLoader"].includes(type);
  return { inputs: type === "DiffControlNetLoader" ? ["model"] : [], outputs: vision ? ["CLIP_VISION"] : [] };
}
console.log(
  JSON.stringify({
    there,
    again,
    back: back.map(([type, values, uses]) => toTheirs(type, values, usesFor(uses))),
    prompts: prompts.map(withTheirs),
  }),
);
