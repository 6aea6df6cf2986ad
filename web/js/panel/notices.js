// Toasts for what a user should hear of: a device that fails and is met by doing with less, evictions that cost time.
import { app } from "../../../../scripts/app.js";
import { t } from "./text.js";

export function toast(severity, detail, life = 5000) {
  app.extensionManager.toast.add({ severity, summary: t("name"), detail, life });
}

let heard = null;

/** The notices of a report that are newer than those of the reports before. The first report's are old. Pure. */
export function fresh(report, before) {
  const last = report.notices.at(-1)?.number ?? 0;
  const notices = before === null ? [] : report.notices.filter((notice) => notice.number > before);
  return { notices, last: Math.max(last, before ?? 0) };
}

export function showNotices(report, wanted) {
  const { notices, last } = fresh(report, heard);
  heard = last;
  if (wanted) for (const notice of notices) toast("warn", `${t.said(notice.from).text}: ${t.said(notice.text).text}`, 10000);
}
