// Small helpers for the DOM and for formatting. Doesn't know about jobs or the server.

export const $ = (id) => document.getElementById(id);

/** Create an element with properties and children; `class` and `data` are as in HTML. */
export function make(tag, { class: names, data, ...properties } = {}, ...children) {
  const element = document.createElement(tag);
  if (names) element.className = names;
  if (data) Object.assign(element.dataset, data);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Set an element's text only if it differs, to avoid needless layout and announcements. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Announce a sentence to screen readers. */
export function announce(text) {
  say($("announcer"), text);
}

let toastTimer = 0;

/** Show a message over the page for a few seconds, or until it's dismissed if `isError`. */
export function toast(text, isError = false) {
  clearTimeout(toastTimer);
  say($("toast-text"), text);
  $("toast").dataset.kind = isError ? "error" : "note";
  // elements outside an open dialog can't be seen or clicked
  (document.querySelector("dialog[open]") ?? document.body).append($("toast"));
  $("toast").hidden = false;
  if (!isError) toastTimer = setTimeout(dismissToast, 4000);
}

export function dismissToast() {
  $("toast").hidden = true;
}

document.addEventListener(
  "close",
  ({ target }) => target.contains($("toast")) && document.body.append($("toast")),
  true,
);

/** Copy a text to the clipboard; on plain HTTP, where that API is unavailable, via a selection. */
export async function copy(text, near) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, class: "unseen", "aria-hidden": "true" });
  near.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  if (!isDone) throw new Error("The browser doesn't allow copying.");
  return undefined;
}

export const plural = (count, noun) =>
  `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** A human-readable duration. */
export function duration(seconds) {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A human-readable number of bytes. */
export function bytes(count) {
  const [unit, size] = count < 1e6 ? ["kB", 1e3] : count < 1e9 ? ["MB", 1e6] : ["GB", 1e9];
  return `${rate(count / size)} ${unit}`;
}

/** How long ago a time in seconds since the epoch was. */
export function ago(time) {
  const seconds = Math.max(0, Date.now() / 1000 - time);
  if (seconds < 45) return "just now";
  if (seconds < 5400) return `${Math.max(1, Math.round(seconds / 60))} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

/** A number with one decimal below 10, and none above. */
export const rate = (value) =>
  value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en");

/** Ask for confirmation; resolves to whether the user agreed. */
export function confirmed(question, action) {
  const dialog = $("confirm");
  say($("confirm-question"), question);
  say($("confirm-yes"), action);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
