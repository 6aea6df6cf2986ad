// The pack's settings, under "Spillway" in ComfyUI's settings. The server reads them from the user's settings file.
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "spillway.Settings",
  settings: [
    {
      id: "Spillway.Cache.Enabled",
      name: "Use Spillway's output cache",
      tooltip:
        "Keeps the outputs of nodes for as long as RAM allows, and evicts first what is cheap to make again. " +
        "Takes effect when ComfyUI is restarted. The flags --cache-none, --cache-lru and --cache-classic go before it.",
      category: ["Spillway", "Output cache", "Enabled"],
      type: "boolean",
      defaultValue: true,
    },
    {
      id: "Spillway.Cache.RamGB",
      name: "Most RAM for cached outputs, in GB",
      tooltip:
        "Outputs are evicted beyond it, however much RAM is free. 0 sets no limit, so that the headroom decides. " +
        "Takes effect with the next prompt.",
      category: ["Spillway", "Output cache", "RamGB"],
      type: "number",
      attrs: { min: 0, max: 10000, step: 1 },
      defaultValue: 0,
    },
    {
      id: "Spillway.Cache.DiskGB",
      name: "Disk space for evicted outputs, in GB",
      tooltip:
        "Writes outputs that took long to make to the user folder when they are evicted, and finds them again after " +
        "a restart. 0 writes none. Takes effect with the next prompt.",
      category: ["Spillway", "Output cache", "DiskGB"],
      type: "number",
      attrs: { min: 0, max: 10000, step: 1 },
      defaultValue: 0,
    },
    {
      id: "Spillway.Cache.DiskSeconds",
      name: "Seconds that an output on disk must have taken",
      tooltip: "Outputs that were made faster are not worth a file.",
      category: ["Spillway", "Output cache", "DiskSeconds"],
      type: "number",
      attrs: { min: 0, max: 100000, step: 1 },
      defaultValue: 10,
    },
    {
      id: "Spillway.Store.Address",
      name: "Where outputs are shared with other machines",
      tooltip:
        "An address that fsspec can open: file:///mnt/nas/cache, s3://bucket/prefix, smb://, sftp://, gs://. All " +
        "ComfyUIs with this address find what one of them has made. What leaves this machine: pictures, masks, " +
        "latents, text encodings, sound and video that took long to make, hashes of what they were made from, names " +
        "of nodes, and texts that nodes put together. Models and workflows do not. Empty shares nothing. " +
        "SPILLWAY_STORE goes before it. Takes effect with the next prompt.",
      category: ["Spillway", "Shared store", "Address"],
      type: "text",
      defaultValue: "",
    },
    {
      id: "Spillway.Store.Seconds",
      name: "Seconds that a shared output must have taken",
      tooltip: "Outputs that were made faster are not worth the way there and back.",
      category: ["Spillway", "Shared store", "Seconds"],
      type: "number",
      attrs: { min: 0, max: 100000, step: 1 },
      defaultValue: 10,
    },
    {
      id: "Spillway.Store.Key",
      name: "Key of the shared store",
      tooltip:
        "A text of 8 to 200 characters, the same on all machines. Outputs are sealed with it (HMAC), and what has " +
        "no seal, or one of another key, is not used. Without a key, whoever may write to the store is trusted. It " +
        "lies in the settings file as it is. SPILLWAY_STORE_KEY goes before it.",
      category: ["Spillway", "Shared store", "Key"],
      type: "text",
      defaultValue: "",
    },
    {
      id: "Spillway.Store.WaitSeconds",
      name: "Most seconds that a prompt waits for the shared store",
      tooltip:
        "For all questions of a prompt together, where they bring nothing. A store that does not answer in time is " +
        "left alone for half a minute, and longer if it still does not answer then. Writing holds up nobody.",
      category: ["Spillway", "Shared store", "WaitSeconds"],
      type: "number",
      attrs: { min: 0, max: 100000, step: 1 },
      defaultValue: 5,
    },
    {
      id: "Spillway.Store.GB",
      name: "Most space of the shared store, in GB",
      tooltip:
        "Whoever writes removes the oldest outputs beyond it. Of machines with different numbers the smallest " +
        "counts. 0 sets no limit.",
      category: ["Spillway", "Shared store", "GB"],
      type: "number",
      attrs: { min: 0, max: 10000, step: 1 },
      defaultValue: 50,
    },
    {
      id: "Spillway.Store.Days",
      name: "Days after which shared outputs go",
      tooltip:
        "Whoever writes removes outputs that are older. In folders (file://) the time since their last use counts, " +
        "elsewhere since they were written. 0 sets no limit.",
      category: ["Spillway", "Shared store", "Days"],
      type: "number",
      attrs: { min: 0, max: 100000, step: 1 },
      defaultValue: 30,
    },
    {
      id: "Spillway.Models.DeviceGB",
      name: "Most device memory for all models together, in GB",
      tooltip:
        "The most memory of a device that the weights of all Spillway models may hold. Models that were used longest " +
        "ago give way. On a CPU the device is RAM. 0 sets no limit, so that what is free decides. Takes effect with " +
        "the next prompt. A Spillway Policy node may set a smaller limit for its workflow.",
      category: ["Spillway", "Models", "DeviceGB"],
      type: "number",
      attrs: { min: 0, max: 10000, step: 1 },
      defaultValue: 0,
    },
    {
      id: "Spillway.Models.Manage",
      name: "Let every loader build Spillway models",
      tooltip:
        "ComfyUI's own loaders, and those of other packs, give models that Spillway manages: checkpoints, " +
        "diffusion models, text encoders, VAEs, CLIP vision, ControlNets, upscale models, audio encoders. " +
        "What cannot be managed is left to ComfyUI. Takes effect with the next prompt, which loads models " +
        "anew.",
      category: ["Spillway", "Models", "Manage"],
      type: "boolean",
      defaultValue: false,
    },
  ],
});
