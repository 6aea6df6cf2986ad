// Convert graph: Spillway's loaders in the place of ComfyUI's, and back, by command, node menu and toolbar button.
import { app } from "../../../scripts/app.js";
import { isOurs, isTheirs, toOurs, toTheirs } from "./convert/loaders.js";
import { allNodes, convert } from "./convert/replace.js";
import { toast } from "./panel/notices.js";
import { loadTexts, t } from "./panel/text.js";

/** Convert nodes and say what came of it. ComfyUI's undo takes all of it back at once. */
function run(nodes, back = false) {
  const { done, left } = back ? convert(nodes, isOurs, toTheirs) : convert(nodes, isTheirs, toOurs);
  if (done) {
    app.canvas?.setDirty?.(true, true);
    app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
  }
  const key = left.length ? "convert.left" : done ? "convert.done" : "convert.none";
  toast(left.length ? "warn" : done ? "success" : "info", t(key, { count: done, names: left.join(", ") }));
}

const whole = () => allNodes(app.rootGraph ?? app.graph);
const command = (id, icon, label, back) => ({ id: `Spillway.${id}`, icon, label, function: () => run(whole(), back) });

await loadTexts(); // the button's are read when the extension is registered
app.registerExtension({
  name: "spillway.Convert",
  commands: [
    command("Convert", "mdi mdi-swap-horizontal", "Use Spillway's loaders in this graph", false),
    command("ConvertBack", "mdi mdi-undo-variant", "Use ComfyUI's loaders in this graph", true),
  ],
  menuCommands: [{ path: ["Extensions", "Spillway"], commands: ["Spillway.Convert", "Spillway.ConvertBack"] }],
  actionBarButtons: [
    {
      icon: "mdi mdi-swap-horizontal",
      label: t("convert.button"),
      tooltip: t("convert.tip"),
      onClick: () => run(whole()),
    },
  ],
  getNodeMenuItems(node) {
    if (isTheirs(node.type)) return [{ content: t("convert.node"), callback: () => run([node]) }];
    if (isOurs(node.type)) return [{ content: t("convert.back"), callback: () => run([node], true) }];
    return [];
  },
});
