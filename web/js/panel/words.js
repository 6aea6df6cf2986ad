// Words for figures: sizes, seconds, the sentence that sums up, and the report as text. Pure.
import { deviceBars, mainCard, modelCards, ramBar, runRows } from "./figures.js";

const GB = 2 ** 30;

/** "6.8 GB", as nodes count GB: 2^30 bytes. */
export function size(bytes) {
  if (bytes >= 0.1 * GB) return `${(bytes / GB).toFixed(bytes < 99.95 * GB ? 1 : 0)} GB`;
  if (bytes >= 2 ** 20) return `${Math.round(bytes / 2 ** 20)} MB`;
  return bytes > 0 ? `${Math.max(1, Math.round(bytes / 1024))} KB` : "0";
}

/** "6.8 of 11.9 GB" needs the unit once where it is the same. */
export function sizeOf(part, whole, t) {
  const [number, unit] = size(part).split(" ");
  const same = unit === size(whole).split(" ")[1];
  return t("of", { part: same ? number : size(part), whole: size(whole) });
}

export function seconds(value) {
  if (value >= 60) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return value >= 10
    ? `${Math.round(value)} s`
    : value >= 0.095
      ? `${value.toFixed(1)} s`
      : `${Math.round(value * 1000)} ms`;
}

export const percent = (part) => `${Math.round(100 * part)} %`;

// Below this part of a step, waiting for the bus is hidden behind the computation.
export const HIDDEN = 0.05;

/** Bytes that each step brings: as counted in the last step, or else as the residency says. */
export function perStep(card) {
  return card.steps > 1 ? card.step.streamed : card.total - card.resident;
}

/** What bringing costs: "hidden", seconds of waiting for the bus, or null where nothing was timed. */
export function waiting(card) {
  const { seconds: all, compute } = card.step ?? {};
  if (!all || compute == null) return null;
  const wait = Math.max(0, all - compute);
  return wait < HIDDEN * all ? "hidden" : wait;
}

/** The sentence that sums up. */
export function summary(report, t) {
  const card = mainCard(modelCards(report));
  if (!card) return t("sum.none");
  const names = { name: card.name, total: size(card.total), device: card.device, percent: percent(card.share) };
  if (!card.ours) return t("sum.comfyui", names);
  if (card.onCpu && card.steps)
    return t(card.own_ram ? "sum.cpucopies" : "sum.cpu", { ...names, copies: size(card.own_ram) });
  if (card.onCpu) return t("sum.waiting", names);
  if (!card.steps && !card.resident) return t("sum.waiting", names);
  const brought = perStep(card);
  if (card.share > 0.995) return t("sum.all", names);
  const said = t("sum.part", { ...names, brought: sizeOf(brought, card.total, t) });
  const wait = waiting(card);
  if (wait === null) return `${said}${t("sum.end")}`;
  if (wait === "hidden") return `${said}${t("sum.hidden")}`;
  return `${said}${t("sum.costs", { wait: seconds(wait), all: seconds(card.step.seconds) })}`;
}

/** A bar in words, for screen readers and for the text. */
export function barInWords(bar, t) {
  const parts = bar.parts.filter((part) => part.bytes > 0 && part.kind !== "free");
  return parts.map((part) => `${part.name ?? t(`part.${part.kind}`)} ${size(part.bytes)}`).join(", ");
}

/** Who limits the RAM. A limit of no kind that is known here is named as the server names it. */
export function limitInWords({ total, reason, limit, stalled }, t) {
  const known = ["machine", "commit", "process", "cgroup", "variable"].includes(limit);
  const words = known ? t(`limit.${limit}`, { size: size(total) }) : t("limit.by", { reason });
  return stalled > 0 ? t("limit.stalled", { words, percent: percent(stalled) }) : words;
}

/** What this machine did with the shared store. */
export function storeLine(store, t) {
  const saved = seconds(store.saved_seconds);
  return t("cache.store", { found: store.found, saved, written: store.written, size: size(store.written_bytes) });
}

/** How far a file is that comes from elsewhere. */
export function comingLine(file, t) {
  const part = sizeOf(file.come_bytes, file.total_bytes, t);
  if (file.stopped) return t("coming.stopped", { name: file.file, part, why: t.said(file.stopped).text });
  if (!(file.speed > 0)) return t("coming.waits", { name: file.file, part });
  const left = seconds((file.total_bytes - file.come_bytes) / file.speed);
  return t("coming.now", { name: file.file, part, speed: size(file.speed), left });
}

/** The whole report as text, for an issue or a forum. */
export function asText(report, t) {
  const lines = [`## ${t("title")}`, "", summary(report, t), ""];
  for (const bar of deviceBars(report)) {
    lines.push(`- **${bar.name}** (${bar.device}, ${sizeOf(bar.used, bar.total, t)}): ${barInWords(bar, t)}`);
    if (bar.peak) lines.push(`  - ${t("peak", { size: size(bar.peak) })}`);
  }
  const ram = ramBar(report);
  lines.push(`- **${t("ram")}** (${sizeOf(ram.used, ram.total, t)}; ${ram.reason}): ${barInWords(ram, t)}`, "");
  for (const card of modelCards(report)) {
    const places = Object.entries(card.bytes).filter(([, bytes]) => bytes);
    const where = places.map(([place, bytes]) => `${place} ${size(bytes)}`).join(", ");
    const kind = card.title !== card.name && card.name;
    lines.push(
      `- **${card.title}** (${[kind, card.by, card.device, card.format].filter(Boolean).join(", ")}): ${where}`,
    );
    lines.push(...card.decisions.map((decision) => `  - ${decision}`));
  }
  lines.push(...(report.coming ?? []).map((file) => `- ${comingLine(file, t)}`));
  const run = runRows(report);
  if (run) {
    lines.push("", `### ${t("run.title")}: ${seconds(run.seconds)}`, "");
    const rows = run.rows.map(
      (row) => `| ${row.kind} (${row.id}) | ${seconds(row.seconds)} | ${size(row.peak || row.rss)} |`,
    );
    lines.push(`| ${t("run.node")} | ${t("run.seconds")} | ${t("run.peak")} |`, "| --- | --- | --- |", ...rows);
  }
  const { cache, store } = report;
  if (cache) lines.push("", t("cache.holds", { count: cache.entries, size: size(cache.ram_bytes) }));
  if (store) lines.push(storeLine(store, t));
  if (store?.state) lines.push(t("cache.trouble", { why: t.said(store.state).text }));
  return `${lines.join("\n")}\n`;
}
