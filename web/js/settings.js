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
  ],
});
