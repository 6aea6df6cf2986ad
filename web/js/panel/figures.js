// Turns a report of GET /spillway/memory into what the panel draws. Pure: no page, no server, all sizes in bytes.

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

/** What a person calls a model: its file, or else its class. */
const titleOf = (model) => (model.file ?? "").replace(/\.(safetensors|gguf|sft)$/, "") || model.name;

/** Of each device: its parts, which add up to its total, and the most that was in use during the last run. */
export function deviceBars(report) {
  return Object.entries(report.memory.devices).map(([device, memory]) => {
    const here = report.models.filter((model) => model.device === device && model.bytes.vram > 0);
    const weights = sum(here.map((model) => model.bytes.vram));
    const used = memory.total - memory.free;
    // What comfy-aimdo maps lies beside torch's own memory.
    const mapped = sum(here.filter((model) => model.vbar === "aimdo").map((model) => model.bytes.vram));
    const process = Math.min(used, Math.max(memory.reserved + mapped, weights));
    const kept = Math.max(0, ...report.models.filter((m) => m.device === device).map((m) => m.kept_free ?? 0));
    const headroom = Math.min(memory.free, kept);
    const parts = here.map((model) => ({ kind: "weights", name: titleOf(model), bytes: model.bytes.vram }));
    parts.push({ kind: "working", bytes: Math.max(0, process - weights) });
    parts.push({ kind: "others", bytes: Math.max(0, used - process) });
    parts.push({ kind: "headroom", bytes: headroom });
    parts.push({ kind: "free", bytes: Math.max(0, memory.free - headroom) });
    const peak = Math.max(0, ...(report.run?.nodes ?? []).map((node) => node.peaks[device] ?? 0));
    const beside = Math.max(0, used - process);
    return {
      device,
      name: report.names[device] ?? device,
      total: memory.total,
      used,
      parts,
      peak,
      peakAt: peak + beside,
    };
  });
}

/** The RAM, with its parts, its total and who set that. The page cache is what the system gives back when asked. */
export function ramBar(report) {
  const { memory } = report;
  let left = memory.anonymous;
  const take = (bytes) => {
    const taken = Math.min(left, Math.max(0, bytes));
    left -= taken;
    return taken;
  };
  const inRam = report.models.map((model) => (model.by === "Spillway" ? model.own_ram : model.bytes.ram));
  const parts = [
    { kind: "pins", bytes: take(memory.pinned) },
    { kind: "models", bytes: take(sum(inRam)) },
    { kind: "cache", bytes: take(memory.cached) },
    { kind: "process", bytes: left },
  ];
  parts.push({ kind: "others", bytes: Math.max(0, memory.total - memory.available - sum(parts.map((p) => p.bytes))) });
  const room = Math.max(0, memory.total - sum(parts.map((part) => part.bytes)));
  const files = Math.min(room, memory.page_cache);
  parts.push({ kind: "files", bytes: files }, { kind: "free", bytes: room - files });
  const { total, available, reason, limit, stalled } = memory;
  return { total, used: total - available, reason, limit, stalled, parts };
}

const PLACES = { r: "resident", p: "pinned", f: "file" };

/** Of each model, those that sample first: what a card shows. `strip` joins neighbours that lie in the same place, as parts from 0 to 1. */
export function modelCards(report) {
  const models = [...report.models].sort((a, b) => Number(b.samples ?? false) - Number(a.samples ?? false));
  return models.map((model) => {
    const layers = model.residency.map(([name, bytes], index) => ({
      name,
      bytes,
      place: PLACES[model.places?.[index]] ?? "file",
    }));
    const total = sum(layers.map((layer) => layer.bytes)) || model.total;
    const inPlace = { resident: 0, pinned: 0, file: 0 };
    for (const layer of layers) inPlace[layer.place] += layer.bytes;
    const ours = model.by === "Spillway";
    const title = titleOf(model);
    const resident = ours ? inPlace.resident : model.bytes.vram;
    return {
      ...model,
      title,
      ours,
      onCpu: model.device === "cpu",
      layers,
      total,
      resident,
      inPlace,
      share: total ? resident / total : 0,
      strip: strip(layers, total),
    };
  });
}

function strip(layers, total) {
  const parts = [];
  let before = 0;
  for (const layer of layers) {
    const last = parts.at(-1);
    const to = (before + layer.bytes) / (total || 1);
    if (last && last.place === layer.place) last.to = to;
    else parts.push({ place: layer.place, from: before / (total || 1), to });
    before += layer.bytes;
  }
  return parts;
}

/** The layer at a part of a strip, from 0 to 1. */
export function layerAt(card, part) {
  let before = 0;
  for (const layer of card.layers) {
    before += layer.bytes;
    if (before >= part * card.total) return layer;
  }
  return card.layers.at(-1) ?? null;
}

/** The model that a person asks about: of those that sample the one that runs or has run, or else the largest. */
export function mainCard(cards) {
  const samplers = cards.filter((card) => card.samples);
  return samplers.find((card) => card.running) ?? samplers[0] ?? cards.find((card) => card.running) ?? cards[0] ?? null;
}

/** The last run: its nodes with seconds, and `part` of the slowest one; its peaks by device. */
export function runRows(report, most = 12) {
  const { run } = report;
  if (!run) return null;
  const slowest = Math.max(1e-9, ...run.nodes.map((node) => node.seconds));
  const rows = run.nodes.map((node) => ({
    ...node,
    part: node.seconds / slowest,
    peak: Math.max(0, ...Object.values(node.peaks)),
  }));
  const slow = rows.filter((row) => row.seconds >= 0.01).sort((a, b) => b.seconds - a.seconds);
  const shown = new Set(slow.slice(0, most));
  return {
    ...run,
    rows: rows.filter((row) => shown.has(row)),
    hidden: rows.length - shown.size,
    peak: Math.max(0, ...rows.map((row) => row.peak)),
    rss: Math.max(0, ...rows.map((row) => row.rss)),
  };
}

/** The number for the tab's icon: how full the fullest device is, or else the RAM. */
export function iconNumber(report) {
  const devices = Object.values(report.memory.devices).map((memory) => 1 - memory.free / memory.total);
  const full = devices.length ? Math.max(...devices) : 1 - report.memory.available / report.memory.total;
  return `${Math.round(100 * Math.min(1, Math.max(0, full)))}%`;
}

/** What a node's badge says: the share of the model that it loaded, or its seconds and its peak. null for nothing. */
export function nodeFigures(report, id) {
  const card = modelCards(report).find((model) => model.node?.id === id && model.device !== "cpu");
  if (card) return { share: card.share };
  const node = report.run?.nodes.find((one) => one.id === id);
  if (!node || node.seconds < 0.05) return null;
  return { seconds: node.seconds, peak: Math.max(0, ...Object.values(node.peaks)) };
}
