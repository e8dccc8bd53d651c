// Saves images, archives and contact sheets as files, with an API key and without.

import { $, bytes, make, toast } from "./dom.js";
import { ask, hasKey, jobPath } from "./api.js";

const SHEET_IMAGES = 100; // as many as the server puts on one

/** Save what a path leads to as a file; with a key its bytes pass through the browser's memory. */
export async function download(path, name) {
  if (!hasKey()) return click(path, name);
  return saveBlob(await ask(path), name);
}

/**
 * Save an archive, which may be larger than memory. A link can send no key: with one the archive
 * is streamed into a file that the person chooses, where the browser can do that.
 */
export async function downloadArchive(path, name) {
  if (!hasKey()) return click(path, name);
  if (!window.showSaveFilePicker) {
    const response = await ask(path);
    toast(`${sizeOf(response)}: this browser holds them in memory until they are saved.`);
    return saveBlob(response, name);
  }
  const file = await chosenFile(name);
  if (!file) return undefined;
  const response = await ask(path);
  toast(`Saving ${sizeOf(response)}. Leave this page open.`);
  await response.body.pipeTo(await file.createWritable());
  return toast(`${file.name} is saved.`);
}

/** Offer every contact sheet of a job: a link to the only one, or a button that shows them all. */
export function offerSheets(job, made) {
  const count = Math.ceil(made / SHEET_IMAGES), list = $("sheet-list").querySelector("ul");
  $("sheet").hidden = count !== 1;
  $("sheet").href = sheetPath(job, 0);
  $("sheets").hidden = count < 2;
  if (count < 2) foldSheets();
  while (list.children.length > count) list.lastElementChild.remove();
  while (list.children.length < count) list.append(make("li", {}, sheetLink(list.children.length + 1)));
  [...list.children].forEach((item, page) => (item.firstElementChild.href = sheetPath(job, page)));
}

export function foldSheets(isFolded = true) {
  $("sheets").ariaExpanded = String(!isFolded);
  $("sheet-list").hidden = isFolded;
}

/** Save the sheet behind a link of `offerSheets`. */
export function downloadSheet(link, job) {
  const suffix = link.id === "sheet" ? "" : `-sheet-${link.textContent}`;
  return download(link.getAttribute("href"), `${job}${suffix}.png`);
}

const sheetPath = (job, page) => `${jobPath(job)}/sheet.png${page ? `?page=${page}` : ""}`;

const sheetLink = (number) => make("a", { class: "button", "aria-label": `Contact sheet ${number}` }, String(number));

const sizeOf = (response) => bytes(Number(response.headers.get("Content-Length")));

/** Where the person wants an archive to go; null when they think better of it. */
async function chosenFile(name) {
  const types = [{ description: "ZIP archive", accept: { "application/zip": [".zip"] } }];
  try {
    return await window.showSaveFilePicker({ suggestedName: name, types });
  } catch (error) {
    if (error.name === "AbortError") return null;
    throw error;
  }
}

async function saveBlob(response, name) {
  const url = URL.createObjectURL(await response.blob());
  click(url, name);
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function click(href, name) {
  make("a", { href, download: name }).click();
}
