// Asks the server for what the panel shows. The server sends `spillway.state` only while a page says that it looks.
import { api } from "../../../../scripts/api.js";

const EVENT = "spillway.state";
const AGAIN_MS = 5000; // the server forgets a page after three times this

/** Ask a route for something. Raises an Error with the server's words where it says no. */
export async function post(path, body) {
  const answer = await api.fetchApi(`/spillway/${path}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error ?? `${answer.status} ${answer.statusText}`);
  return told;
}

async function get(path) {
  const answer = await api.fetchApi(`/spillway/${path}`);
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  return answer.json();
}

/** The next report, asked for once. */
export const fetchReport = () => get("memory");

/** How far the comparison with ComfyUI is. */
export const fetchComparison = () => get("compare");

/** Hand every report to `onReport` while it is on. The listener stays: an event that nobody knows would be an error. */
export class Connection {
  #on = false;
  #timer = null;

  constructor(onReport) {
    api.addEventListener(EVENT, (event) => onReport(event.detail));
    api.addEventListener("reconnected", () => this.#tell());
    window.addEventListener("visibilitychange", () => this.#tell());
  }

  start() {
    this.#on = true;
    clearInterval(this.#timer);
    this.#timer = setInterval(() => this.#tell(), AGAIN_MS);
    return this.#tell();
  }

  stop() {
    if (!this.#on) return;
    this.#on = false;
    clearInterval(this.#timer);
    this.#say(false);
  }

  #tell() {
    if (this.#on) return this.#say(!document.hidden);
  }

  async #say(looks) {
    const client_id = api.clientId ?? api.initialClientId;
    try {
      if (client_id) await post("look", { client_id, looks });
    } catch (error) {
      console.warn("[Spillway] the server does not send the state of memory", error); // asked again in a moment
    }
  }
}
