// The dialog of one image: large, with everything that it takes to make it again.

import { $, announce, copy, duration, make, say, toast } from "./dom.js";
import { get, imagePath, reasonOf } from "./api.js";
import { imageFields, jobFields } from "./fields.js";
import { download } from "./downloads.js";
import { Picture } from "./picture.js";

export class Recipe {
  /** `again(image)` queues the image anew, `reuse(image)` puts its settings into the form. */
  constructor(gallery, { again, reuse }) {
    this.gallery = gallery;
    this.dialog = $("recipe");
    this.picture = new Picture($("recipe-image"));
    this.index = null;
    this.job = null;
    this.asked = null; // what came of asking for the whole recipe of the image on show
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
    this.asked = null;
    this.update();
    if (!this.dialog.open) this.dialog.showModal();
  }

  preview(jobId, index, blob) {
    if (this.job?.id === jobId && this.runningIndex === index) this.picture.preview(blob);
  }

  /** Show what is known of the image now. */
  update() {
    const image = this.image;
    if (!image) return;
    this.image_ = image;
    const isMade = image.state === "succeeded";
    if (isMade) {
      this.picture.show(imagePath(this.job.id, image.index));
      this.asked ??= this.#ask();
    } else if (image.state !== "running") {
      this.picture.clear();
    }
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
    // `disabled` would take the focus, and the arrow keys with it, out of the dialog
    $("recipe-previous").ariaDisabled = String(this.gallery.beside(image.index, -1) === null);
    $("recipe-next").ariaDisabled = String(this.gallery.beside(image.index, 1) === null);
    this.#show(image);
  }

  #show(image) {
    const { recipe = null, problem = null } = this.asked ?? {};
    const facts = [...factsOf(recipe ?? known(image, this.job.view)), ...factsOf(result(image))];
    const text = JSON.stringify(facts);
    if (text !== this.factsText) $("recipe-facts").replaceChildren(...rows(facts));
    this.factsText = text;
    const isComing = image.state === "queued" || image.state === "running";
    const waiting = isComing ? "The rest of the recipe comes with the picture." : "";
    $("recipe-note").classList.toggle("error", problem !== null);
    say($("recipe-note"), problem === null ? waiting : `The rest of the recipe could not be had: ${problem}`);
  }

  /** Ask for what the picture carries; the answer comes into the returned object. */
  #ask() {
    const asked = { recipe: null, problem: null };
    asked.done = get(`${imagePath(this.job.id, this.index)}/recipe`)
      .then((recipe) => (asked.recipe = recipe))
      .catch((error) => (asked.problem = reasonOf(error)))
      .then(() => asked === this.asked && this.update());
    return asked;
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

  /** As JSON, with the names that the picture has; of one that is not made, what is known. */
  async #copy() {
    const button = $("recipe-copy"), { asked, image } = this;
    try {
      await asked?.done;
      const recipe = asked?.recipe ?? known(image, this.job.view);
      await copy(JSON.stringify(recipe, null, 2), this.dialog);
      button.focus();
      say(button, asked?.recipe ? "Copied" : "Copied in part");
      announce(asked?.recipe ? "Recipe copied." : "What is known of the recipe is copied.");
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

/** What a recipe will say in any case, under its names. */
function known(image, { model }) {
  return { model, ...imageFields(image), ...jobFields(image) };
}

/** What became of the image, which no recipe tells. */
function result({ seconds, attempts, sha256 }) {
  return { made_in: seconds === null ? null : duration(seconds), attempts: attempts > 1 ? attempts : null, "SHA-256": sha256 };
}

/** Pairs of a name and a text for all that is set; the prompt stands above them. */
function factsOf({ prompt, ...recipe }) {
  const pairs = Object.entries(recipe);
  return pairs.filter(([, value]) => value !== null && value !== "").map(([name, value]) => [titled(name), worded(value)]);
}

const titled = (name) => `${name[0].toUpperCase()}${name.slice(1).replaceAll("_", " ")}`;

function worded(value) {
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "object") return String(value);
  return Object.entries(value).map(([name, one]) => `${name} ${worded(one)}`).join("\n");
}

function rows(pairs) {
  return pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
}
