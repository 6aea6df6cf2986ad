// The pack's settings, under "Spillway" in ComfyUI's settings. The server reads them from the user's settings file.
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "Spillway.Settings",
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
  ],
});
