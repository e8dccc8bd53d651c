// Saves images, archives and contact sheets as files, with or without an API key.

import { $, bytes, make, toast } from "./dom.js";
import { ask, hasKey, jobPath } from "./api.js";

const SHEET_IMAGES = 100; // per sheet, as on the server

/** Save the file at a path; with an API key, its bytes pass through the browser's memory. */
export async function download(path, name) {
  if (!hasKey()) return click(path, name);
  return saveBlob(await ask(path), name);
}

/**
 * Save an archive, which may not fit into memory. A link can't send an API key, so with a key the
 * archive is streamed into a file that the user chooses, if the browser supports that.
 */
export async function downloadArchive(path, name) {
  if (!hasKey()) return click(path, name);
  if (!window.showSaveFilePicker) {
    const response = await ask(path);
    toast(`Downloading ${sizeOf(response)}, which this browser keeps in memory until it is saved.`);
    return saveBlob(response, name);
  }
  const file = await chosenFile(name);
  if (!file) return undefined;
  const response = await ask(path);
  toast(`Saving ${sizeOf(response)}. Keep this page open.`);
  await response.body.pipeTo(await file.createWritable());
  return toast(`Saved ${file.name}.`);
}

/** Offer a job's contact sheets: a link if there's one, or a button that lists several. */
export function offerSheets(job, finished) {
  const count = Math.ceil(finished / SHEET_IMAGES), list = $("sheet-list").querySelector("ul");
  $("sheet").hidden = count !== 1;
  $("sheet").href = sheetPath(job, 0);
  $("sheets").hidden = count < 2;
  if (count < 2) foldSheets();
  while (list.children.length > count) list.lastElementChild.remove();
  while (list.children.length < count) {
    list.append(make("li", {}, sheetLink(list.children.length + 1)));
  }
  [...list.children].forEach((item, page) => (item.firstElementChild.href = sheetPath(job, page)));
}

export function foldSheets(isFolded = true) {
  $("sheets").ariaExpanded = String(!isFolded);
  $("sheet-list").hidden = isFolded;
}

/** Save the sheet of a link that `offerSheets` created. */
export function downloadSheet(link, job) {
  const suffix = link.id === "sheet" ? "" : `-sheet-${link.textContent}`;
  return download(link.getAttribute("href"), `${job}${suffix}.png`);
}

const sheetPath = (job, page) => `${jobPath(job)}/sheet.png${page ? `?page=${page}` : ""}`;

const sheetLink = (number) =>
  make("a", { class: "button", "aria-label": `Contact sheet ${number}` }, String(number));

const sizeOf = (response) => bytes(Number(response.headers.get("Content-Length")));

/** The file that the user chooses for an archive; null if they cancel. */
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
