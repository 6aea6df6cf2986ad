// Which of Spillway's loaders stands for which of ComfyUI's, and with which values. Pure.

const same = (...names) => Object.fromEntries(names.map((name) => [name, name]));
const clips = (count) => same(...["clip_name1", "clip_name2", "clip_name3", "clip_name4"].slice(0, count));

// ComfyUI's class: Spillway's, and the names of its inputs by those of ComfyUI's. On the way back the first one fits.
const PAIRS = {
  UNETLoader: ["SpillwayLoadDiffusionModel", same("unet_name", "weight_dtype")],
  CheckpointLoaderSimple: ["SpillwayLoadCheckpoint", same("ckpt_name")],
  unCLIPCheckpointLoader: ["SpillwayLoadCheckpoint", same("ckpt_name")],
  ImageOnlyCheckpointLoader: ["SpillwayLoadCheckpoint", same("ckpt_name")],
  VAELoader: ["SpillwayLoadVAE", same("vae_name")],
  CLIPVisionLoader: ["SpillwayLoadCLIPVision", same("clip_name")],
  ControlNetLoader: ["SpillwayLoadControlNet", same("control_net_name")],
  DiffControlNetLoader: ["SpillwayLoadControlNet", same("control_net_name", "model")],
  UpscaleModelLoader: ["SpillwayLoadUpscaleModel", same("model_name")],
  AudioEncoderLoader: ["SpillwayLoadAudioEncoder", same("audio_encoder_name")],
  StyleModelLoader: ["SpillwayLoadStyleModel", same("style_model_name")],
  ModelPatchLoader: ["SpillwayLoadModelPatch", same("name")],
  LoraLoader: ["SpillwayLoraLoader", same("model", "clip", "lora_name", "strength_model", "strength_clip")],
  LoraLoaderModelOnly: ["SpillwayLoraLoaderModelOnly", same("model", "lora_name", "strength_model")],
  CLIPLoader: ["SpillwayLoadCLIP", { clip_name: "clip_name1", type: "type" }],
  DualCLIPLoader: ["SpillwayLoadCLIP", { ...clips(2), type: "type" }],
  TripleCLIPLoader: ["SpillwayLoadCLIP", clips(3)],
  QuadrupleCLIPLoader: ["SpillwayLoadCLIP", clips(4)],
};
const CLIPS = ["CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader", "QuadrupleCLIPLoader"];
const DTYPES = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]; // of ComfyUI's own node
const NONE = "none";
const DEFAULT_TYPE = "stable_diffusion"; // what ComfyUI takes where its loader has no type

export const isTheirs = (type) => Object.hasOwn(PAIRS, type);
export const isOurs = (type) => Object.values(PAIRS).some(([ours]) => ours === type);

/**
 * What stands for a loader of ComfyUI's, or null where nothing does the same: { type, values, names }.
 * values: of its widgets. names: of its inputs, by those of the loader that it replaces.
 */
export function toOurs(type, values) {
  if (!isTheirs(type) || (values.device ?? "default") !== "default") return null;
  const [ours, names] = PAIRS[type];
  const given = renamed(values, names);
  if (ours === "SpillwayLoadCLIP" && !("type" in names)) given.type = DEFAULT_TYPE;
  return { type: ours, values: given, names };
}

/** The way back. uses: {inputs, outputs}, the names of its linked inputs and the types of its linked outputs. */
export function toTheirs(type, values, uses = { inputs: [], outputs: [] }) {
  if (!isOurs(type) || !plain(type, values)) return null;
  const theirs = choose(type, values, uses);
  if (!theirs) return null;
  const names = Object.fromEntries(Object.entries(PAIRS[theirs][1]).map(([name, ours]) => [ours, name]));
  return { type: theirs, values: renamed(values, names), names };
}

/** Whether a loader keeps its weights in a format that ComfyUI's has too. */
function plain(type, values) {
  const known = type === "SpillwayLoadDiffusionModel" ? DTYPES : ["default"];
  return known.includes(values.weight_dtype ?? "default") && (values.clip_dtype ?? "default") === "default";
}

function choose(type, values, uses) {
  if (type === "SpillwayLoadCLIP") return clipLoader(values);
  if (type === "SpillwayLoadCheckpoint")
    return uses.outputs.includes("CLIP_VISION") ? "unCLIPCheckpointLoader" : "CheckpointLoaderSimple";
  if (type === "SpillwayLoadControlNet") return uses.inputs.includes("model") ? "DiffControlNetLoader" : "ControlNetLoader";
  return Object.keys(PAIRS).find((name) => PAIRS[name][0] === type);
}

function clipLoader(values) {
  const given = [1, 2, 3, 4].map((place) => (values[`clip_name${place}`] ?? NONE) !== NONE);
  const count = given.lastIndexOf(true) + 1;
  if (!count || given.slice(0, count).includes(false)) return null;
  return count > 2 && values.type !== DEFAULT_TYPE ? null : CLIPS[count - 1];
}

function renamed(values, names) {
  const known = Object.entries(names).filter(([name]) => name in values);
  return Object.fromEntries(known.map(([name, other]) => [other, values[name]]));
}
