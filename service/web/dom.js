// Small words for the DOM and for people. Knows no job and no server.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children; `class` and `data` are what HTML calls them. */
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

/** Set an element's text only if it differs, so that nothing is laid out or read out in vain. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Read out a sentence to those who listen to the page. */
export function announce(text) {
  say($("announcer"), text);
}

let toastTimer = 0;

/** Show a sentence over the page for a while; `isError` has it stay until it is dismissed. */
export function toast(text, isError = false) {
  clearTimeout(toastTimer);
  say($("toast-text"), text);
  $("toast").dataset.kind = isError ? "error" : "note";
  // what lies outside an open dialog can neither be seen nor pressed
  (document.querySelector("dialog[open]") ?? document.body).append($("toast"));
  $("toast").hidden = false;
  if (!isError) toastTimer = setTimeout(dismissToast, 4000);
}

export function dismissToast() {
  $("toast").hidden = true;
}

document.addEventListener("close", ({ target }) => target.contains($("toast")) && document.body.append($("toast")), true);

/** Put a text on the clipboard; where a page may not (plain HTTP), by way of a selection. */
export async function copy(text, near) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = make("textarea", { value: text, class: "unseen", "aria-hidden": "true" });
  near.append(area);
  area.select();
  const isDone = document.execCommand("copy");
  area.remove();
  if (!isDone) throw new Error("the browser does not let the page copy");
  return undefined;
}

export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** A stretch of time as people say it. */
export function duration(seconds) {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** A number of bytes as people say it. */
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

/** A rate with as many digits as it deserves. */
export const rate = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

/** Ask before what cannot be undone; resolves to whether the person agreed. */
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
