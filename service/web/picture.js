// Shows the image at a path, or a preview of it, in an <img>, and frees what it no longer shows.

import { ask, hasKey } from "./api.js";

export class Picture {
  constructor(img) {
    this.img = img;
    this.path = null;
    this.blobUrl = null;
    img.addEventListener("load", () => (img.dataset.loaded = ""));
    img.addEventListener("error", () => delete img.dataset.loaded);
  }

  /** Show the image at a path; with an API key it's fetched, because <img> can't send one. */
  async show(path) {
    if (path === this.path) return;
    this.path = path;
    if (!hasKey()) {
      this.img.src = path;
      return this.#drop(null);
    }
    const blob = await ask(path).then((response) => response.blob(), () => null);
    if (blob && this.path === path) this.#showBlob(blob);
  }

  /** Show a preview until `show` is called. */
  preview(blob) {
    if (this.path === null) this.#showBlob(blob);
  }

  clear() {
    this.path = null;
    this.img.removeAttribute("src");
    delete this.img.dataset.loaded;
    this.#drop(null);
  }

  #showBlob(blob) {
    const url = URL.createObjectURL(blob);
    this.img.src = url;
    this.#drop(url);
  }

  /** Free the previous image, but only after the new one has probably been displayed. */
  #drop(next) {
    const old = this.blobUrl;
    this.blobUrl = next;
    if (old) setTimeout(() => URL.revokeObjectURL(old), 2000);
  }
}
