// The dialog of one image: large, with everything that it takes to make it again.

import { $, announce, copy, duration, make, say, toast } from "./dom.js";
import { download, imagePath } from "./api.js";
import { Picture } from "./picture.js";

export class Recipe {
  /**
   * `again(image)` queues the image anew, `reuse(image)` puts its settings into the form,
   * `bodyOf(image)` is the POST that makes it again.
   */
  constructor(gallery, { again, reuse, bodyOf }) {
    this.gallery = gallery;
    this.bodyOf = bodyOf;
    this.dialog = $("recipe");
    this.picture = new Picture($("recipe-image"));
    this.index = null;
    this.job = null;
    this.dialog.addEventListener("close", () => this.#onClose());
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") this.#go(1);
      if (event.key === "ArrowLeft") this.#go(-1);
    });
    $("recipe-next").addEventListener("click", () => this.#go(1));
    $("recipe-previous").addEventListener("click", () => this.#go(-1));
    $("recipe-again").addEventListener("click", () => again(this.image));
    $("recipe-reuse").addEventListener("click", () => {
      this.dialog.close();
      reuse(this.image_);
    });
    $("recipe-save").addEventListener("click", () => this.#save());
    $("recipe-copy").addEventListener("click", () => this.#copy());
  }

  get image() {
    return this.index === null ? null : this.job.images[this.index];
  }

  get runningIndex() {
    return this.image?.state === "running" ? this.index : null;
  }

  open(job, index) {
    this.job = job;
    this.picture.clear();
    this.index = index;
    this.update();
    if (!this.dialog.open) this.dialog.showModal();
  }

  preview(jobId, index, blob) {
    if (this.job?.id === jobId && this.index === index) this.picture.preview(blob);
  }

  /** Show what is known of the image now. */
  update() {
    const image = this.image;
    if (!image) return;
    this.image_ = image;
    const isMade = image.state === "succeeded";
    if (isMade) this.picture.show(imagePath(this.job.id, image.index));
    $("recipe-image").alt = isMade ? image.prompt : "";
    this.dialog.dataset.state = image.state;
    say($("recipe-title"), `Image ${image.index + 1} of ${this.job.images.length}`);
    $("recipe-state").hidden = isMade;
    say($("recipe-word"), isMade ? "" : image.state);
    say($("recipe-state"), image.state === "running" ? `${image.step} of ${image.steps} steps` : image.state);
    say($("recipe-prompt"), image.prompt);
    $("recipe-error").hidden = !image.error;
    say($("recipe-error"), image.error ?? "");
    $("recipe-save").hidden = !isMade;
    $("recipe-previous").disabled = this.gallery.beside(image.index, -1) === null;
    $("recipe-next").disabled = this.gallery.beside(image.index, 1) === null;
    const text = JSON.stringify(facts(image, this.job.view));
    if (text !== this.factsText) $("recipe-facts").replaceChildren(...rows(facts(image, this.job.view)));
    this.factsText = text;
  }

  #go(by) {
    const next = this.gallery.beside(this.index, by);
    if (next !== null) this.open(this.job, next);
  }

  async #save() {
    const { index, media_type: type } = this.image;
    const suffix = { "image/jpeg": "jpg", "image/webp": "webp" }[type] ?? "png";
    try {
      await download(imagePath(this.job.id, index), `${this.job.id}-${index}.${suffix}`);
    } catch (error) {
      toast(error.message, true);
    }
  }

  async #copy() {
    const button = $("recipe-copy");
    try {
      await copy(JSON.stringify(this.bodyOf(this.image), null, 2), this.dialog);
      button.focus();
      say(button, "Copied");
      announce("Recipe copied.");
      setTimeout(() => say(button, "Copy recipe"), 2000);
    } catch (error) {
      toast(error.message, true);
    }
  }

  #onClose() {
    const index = this.index;
    this.index = null;
    this.picture.clear();
    if (index !== null) this.gallery.focus(index);
  }
}

function facts(image, job) {
  return Object.entries({
    "Negative prompt": image.negative_prompt,
    Seed: image.seed,
    Size: `${image.width} × ${image.height}`,
    Steps: image.steps,
    Guidance: image.guidance_scale,
    Model: job.model,
    "Made in": image.seconds === null ? null : duration(image.seconds),
    Attempts: image.attempts > 1 ? image.attempts : null,
    "SHA-256": image.sha256,
  }).filter(([, value]) => value !== null && value !== "");
}

function rows(pairs) {
  return pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]);
}
