// Talks to the server: JSON in and out, problem documents as errors, the API key if required.

import { $ } from "./dom.js";

const STORED = "imagemill.key";
let key = sessionStorage.getItem(STORED) ?? localStorage.getItem(STORED);
let asking = null;
$("forget-key").hidden = key === null;
$("forget-key").addEventListener("click", forgetKey);

/** An error response of the server; `errors` are its {pointer, detail}. */
export class Problem extends Error {
  constructor(status, { detail, errors } = {}) {
    super(detail || `the server responded with status ${status}`);
    this.status = status;
    this.errors = errors ?? [];
  }
}

/** Whether requests need a key, so a plain link or <img> won't work. */
export const hasKey = () => key !== null;

export const jobPath = (id) => `v1/jobs/${encodeURIComponent(id)}`;
export const imagePath = (id, index) => `${jobPath(id)}/images/${index}`;

export const thumbnailPath = (id, index, side) => `${imagePath(id, index)}/thumbnail?side=${side}`;

/** A response with any status below 400; asks the user for a key if the server requires one. */
export async function ask(path, { headers, ...options } = {}) {
  for (;;) {
    const used = key;
    const auth = used ? { Authorization: `Bearer ${used}` } : {};
    const response = await fetch(path, { ...options, headers: { ...auth, ...headers } });
    if (response.status === 401) {
      if (key === used) await askForKey();
    } else if (response.status >= 400) {
      const problem = await response.json().catch(() => ({}));
      throw new Problem(response.status, problem);
    } else {
      return response;
    }
  }
}

export const get = async (path, options) => (await ask(path, options)).json();

/** POST, with `body` as JSON, if any. */
export async function post(path, body, headers = {}) {
  const options = { method: "POST", headers };
  if (body !== undefined) {
    options.headers = { ...headers, "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  return (await ask(path, options)).json();
}

export async function remove(path) {
  await ask(path, { method: "DELETE" });
}

/** Queue a job. Every attempt has the same key, so a lost response doesn't queue it twice. */
export async function submit(body) {
  const random = crypto.getRandomValues(new Uint32Array(4));
  const headers = { "Idempotency-Key": `page-${[...random].map((n) => n.toString(36)).join("")}` };
  for (let left = 2; ; left--) {
    try {
      return await post("v1/jobs", body, headers);
    } catch (error) {
      if (error instanceof Problem || left === 0) throw error;
      await new Promise((resolve) => setTimeout(resolve, 700));
    }
  }
}

/** The message to show for an error of the server, the network or the browser. */
export function reasonOf(error) {
  if (error instanceof Problem || error instanceof DOMException) return error.message;
  if (error instanceof TypeError) return "Can't reach the server.";
  throw error;
}

/**
 * Call `work` repeatedly, `seconds()` after each call ends, but not while the page is hidden.
 * `now()` calls it immediately, or immediately after the current call.
 */
export function repeat(seconds, work) {
  let timer = 0, stopped = false, failures = 0, running = false, again = false;
  async function round() {
    clearTimeout(timer);
    again = running;
    if (stopped || running || document.hidden) return;
    running = true;
    try {
      await work();
      failures = 0;
    } catch (error) {
      failures += 1;
      const isExpected = error instanceof Problem || error instanceof TypeError;
      if (!isExpected && error.name !== "AbortError") throw error;
    } finally {
      running = false;
      setOnline(failures === 0);
      const wait = again && !failures ? 0 : seconds() * Math.min(8, 2 ** failures);
      if (!stopped) timer = setTimeout(round, wait * 1000);
    }
  }
  const onSight = () => document.hidden || round();
  document.addEventListener("visibilitychange", onSight);
  round();
  return {
    now: round,
    stop() {
      stopped = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", onSight);
    },
  };
}

function setOnline(isOnline) {
  $("offline").hidden = isOnline;
}

/** Ask the user for a key, only once even if several requests need it. */
function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    const open = () => {
      dialog.returnValue = "";
      dialog.showModal();
      $("key").select();
    };
    $("key-wrong").hidden = key === null;
    $("key").toggleAttribute("aria-invalid", key !== null);
    const onClose = () => {
      if (dialog.returnValue !== "give" || !$("key").value.trim()) return open();
      dialog.removeEventListener("close", onClose);
      keep($("key").value.trim(), $("key-keep").checked);
      asking = null;
      return resolve();
    };
    dialog.addEventListener("close", onClose);
    open();
  });
  return asking;
}

/** Remove the key from this browser, for example before someone else uses it. */
function forgetKey() {
  sessionStorage.removeItem(STORED);
  localStorage.removeItem(STORED);
  location.reload();
}

function keep(value, forLong) {
  key = value;
  $("forget-key").hidden = false;
  sessionStorage.setItem(STORED, value);
  if (forLong) localStorage.setItem(STORED, value);
  else localStorage.removeItem(STORED);
}
