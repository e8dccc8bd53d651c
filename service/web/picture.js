// Shows in one <img> what a path leads to, or a preview of it; lets go of what it no longer shows.

import { ask, hasKey } from "./api.js";

export class Picture {
  constructor(img) {
    this.img = img;
    this.path = null;
    this.blobUrl = null;
    img.addEventListener("load", () => (img.dataset.loaded = ""));
    img.addEventListener("error", () => delete img.dataset.loaded);
  }

  /** Show the picture at a path; with an API key it is fetched, since <img> can send none. */
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

  /** Show bytes that stand in for the picture until `show`. */
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

  /** What was shown before stays on screen until the new picture is there; its bytes may go. */
  #drop(next) {
    const old = this.blobUrl;
    this.blobUrl = next;
    if (old) setTimeout(() => URL.revokeObjectURL(old), 2000);
  }
}
